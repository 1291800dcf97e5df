"""A real model with what is needed to rewrite and to judge it: graph, sites, calibration data, a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from rewriter.core.site import Site
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph

Feeds = Mapping[str, np.ndarray]
Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """One model.

    `calibrate` and `choose` are label-free batches to fit on and to choose ridge and alpha on; `probe` a few for the
    damage of one option. `loss(outputs, batch)` is the task's own loss on `labelled` batches, which only the
    mask search of Kwon et al. needs. `quality(outputs)` is the task's metric on `test` batches and higher is better
    unless `lower_is_better`; `drop(original, new)` says how much of it is lost, in `unit`. `divergence` is what the
    search looks at, label-free, on the outputs of `select` batches.
    """

    name: str
    graph: OnnxGraph
    sites: Sequence[Site]
    tokens: int
    calibrate: Sequence[Feeds]
    choose: Sequence[Feeds]
    select: Sequence[Feeds]
    test: Sequence[Feeds]
    labelled: Sequence[Feeds]
    loss: Callable[[Mapping[str, Tensor], int], Tensor]
    quality: Callable[[Sequence[Outputs]], float]
    divergence: Callable[[Sequence[Outputs], Sequence[Outputs]], float]
    metric: str
    unit: str
    lower_is_better: bool = False

    def drop(self, original: float, new: float) -> float:
        """How much worse `new` is: points of a share, per cent of a perplexity."""
        if self.lower_is_better:
            return 100.0 * (new / original - 1.0)
        return 100.0 * (original - new)


def outputs(graph: OnnxGraph, batches: Sequence[Feeds]) -> list[Outputs]:
    """All outputs of a graph, batch by batch."""
    interpreter = Interpreter(graph)
    return [{name: value.numpy() for name, value in interpreter.run(feeds).items()} for feeds in batches]


def reuse(path: Path, make: Callable[[Path], None]) -> Path:
    """A file that is made once; it appears whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        make(partial)
        partial.replace(path)
    return path
