"""Scoring variants against the original on data that chose nothing: the selection split for the search, never more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.metrics import Metric, Reference, choose_metric
from rewriter.accuracy.paired import Paired
from rewriter.accuracy.registry import METRICS
from rewriter.calibration.data import Dataset, cropping_is_harmless, run_all
from rewriter.core.errors import UserError
from rewriter.core.options import Effort, Options
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import of_spec
from rewriter.runtimes.workers import Worker
from rewriter.search.caches import Maps, converted_data
from rewriter.search.session import ONNXRUNTIME, Session

logger = logging.getLogger("rewriter")

Outputs = dict[str, NDArray[Any]]

SELECT_SAMPLES: Mapping[Effort, int] = {"quick": 150, "normal": 240, "thorough": 2000}
_BANK_SAMPLES = 512  # metrics that look at neighbours fit a bank of references on this many calibration samples
_BANKED = ("similarity", "knn")
_FEW_SAMPLES = 32  # enough to see what kind of output there is
_LABELLED_SAMPLES = 250  # a linear probe is fitted on these
_BATCH = 16


def outputs_of(graph: OnnxGraph, data: Dataset, crop: bool) -> Outputs:
    """Outputs of a graph on all samples, by our interpreter in fp32."""
    interpreter = Interpreter(graph)

    def run(feeds: Mapping[str, NDArray[Any]]) -> Outputs:
        return {name: value.numpy() for name, value in interpreter.run(feeds).items()}

    return run_all(data, run, _BATCH, crop=crop)


def reference_outputs(session: Session, data: Dataset, crop: bool) -> Outputs:
    """Outputs of the untouched model: by ONNX Runtime in a worker on all cores, by our interpreter if that fails."""
    try:
        artifact = session.build(session.graph, "reference", ONNXRUNTIME)
        with Worker("reference", session.target.cores) as worker:
            spec = f"{__name__}:run_artifact"
            answer = worker.call(
                spec, ONNXRUNTIME, artifact, session.target.cores, data, _BATCH, crop, timeout_s=1800.0
            )
    except UserError as problem:
        answer = problem
    if isinstance(answer, dict):
        return answer
    logger.info("the original does not run in ONNX Runtime (%s); our interpreter stands in", answer)
    return outputs_of(session.graph, data, crop)


def run_artifact(runtime: str, artifact: Path, threads: int, data: Dataset, size: int, crop: bool) -> Outputs:
    """In a worker: outputs of a built artifact on all samples, `size` at a time."""
    executable = of_spec(runtime).load(artifact, threads)

    def run(feeds: Mapping[str, NDArray[Any]]) -> Outputs:
        return executable.run(feeds)

    return run_all(data, run, size, crop=crop)


def token_mask(data: Dataset) -> NDArray[np.int64] | None:
    """(N, S) ones at tokens, zeros at padding, or None if the data does not say."""
    lengths = data.lengths()
    if lengths is None:
        return None
    longest = max(array.shape[1] for array in data.inputs.values() if array.ndim == 2)
    return (np.arange(longest) < lengths[:, None]).astype(np.int64)


@dataclass(frozen=True)
class Scorer:
    """The metric, fitted to the original on calibration samples, and the original's outputs on selection samples.

    `task` is accuracy on the labels where there are labels and another metric decides; it is reported, not decided on.
    """

    metric: Metric
    task: Metric | None
    data: Dataset
    original: Outputs
    crop: bool

    @classmethod
    def fit(cls, session: Session) -> Scorer:
        """Run the original on calibration and selection samples. Raises `OptionError` for an unfit metric."""
        assert session.splits is not None
        splits, options = session.splits, session.options
        interpreter = Interpreter(session.graph)
        crop = cropping_is_harmless(
            splits.select, lambda feeds: {name: value.numpy() for name, value in interpreter.run(feeds).items()}
        )
        reference = _reference_samples(splits.calibrate, options)
        outputs = reference_outputs(session, reference, crop)
        metric = choose_metric(options.metric, outputs, reference.labels)
        labelled = reference.labels is not None and bool((reference.labels >= 0).any())
        other = labelled and metric.name != "accuracy"
        task = METRICS["accuracy"](Reference(outputs, reference.labels)) if other else None
        data = spread(splits.select, SELECT_SAMPLES[options.effort], options.seed)
        data = data.labelled() if metric.needs_labels else data
        return cls(metric, task, data, reference_outputs(session, data, crop), crop)

    def paired(self, graph: OnnxGraph, samples: int | None = None, caches: Maps | None = None) -> Paired:
        """The metric of a variant beside the original's, on (the first) selection samples.

        `caches` make caches of the original the variant's (`Variant.caches`).
        """
        data = self.data if samples is None else self.data.subset(np.arange(min(samples, len(self.data))))
        original = {name: array[: len(data)] for name, array in self.original.items()}
        new = outputs_of(graph, converted_data(data, caches or {}), self.crop)
        return self.metric.paired(original, new, data.labels, token_mask(data))


def spread(data: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` samples drawn at random, in a random order: any first part of them is a fair sample too."""
    rows = np.random.default_rng(seed).permutation(len(data))[:count]
    return data.subset(rows)


def _reference_samples(data: Dataset, options: Options) -> Dataset:
    """Labelled calibration samples (a probe needs them) and some others."""
    rng = np.random.default_rng(options.seed)
    known = np.zeros(len(data), bool) if data.labels is None else data.labels >= 0
    count = _BANK_SAMPLES if options.metric in _BANKED else _FEW_SAMPLES
    others = rng.permutation(np.flatnonzero(~known))[:count]
    labelled = rng.permutation(np.flatnonzero(known))[:_LABELLED_SAMPLES]
    return data.subset(np.sort(np.concatenate([labelled, others])))
