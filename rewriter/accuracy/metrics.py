"""Metrics by name. Each compares a new model's outputs with the original's on the same samples, sample by sample.

A metric is first fitted to the original's outputs on samples that certify nothing (a bank of references, a probe), then
scores any number of batches. All live on a known range, so that a bound on the mean needs no assumption.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.paired import Paired, Values
from rewriter.core.errors import OptionError

Array = NDArray[Any]
Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Reference:
    """What a metric may be fitted to: the original's outputs on calibration samples, and their labels if they have any.

    Labels are (N,) classes, -1 where unknown.
    """

    outputs: Outputs
    labels: NDArray[np.int64] | None = None


class Metric(ABC):
    """One metric. `unit` is of its values, `low` and `high` bound them.

    `ideal_original` says that the original scores the best value by definition (fidelity metrics). `why` says how the
    metric came to be chosen.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    meaning: ClassVar[str]
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    higher_is_better: ClassVar[bool] = True
    ideal_original: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __init__(self, reference: Reference) -> None:
        self.why = "asked for"
        self.output = main_output(reference.outputs)

    @abstractmethod
    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """Per-sample values (N,) of the original and of the new model."""

    def paired(
        self,
        original: Outputs,
        new: Outputs,
        labels: NDArray[np.int64] | None = None,
        mask: Array | None = None,
    ) -> Paired:
        """Both models on the same samples. `labels` (N,) where needed; `mask` (N, S), zero at padding tokens."""
        values, new_values = self.values(original, new, labels, mask)
        return Paired(
            self.name, self.unit, values, new_values, self.low, self.high, self.higher_is_better, self.ideal_original
        )

    def _rows(self, outputs: Outputs) -> Array:
        return np.asarray(outputs[self.output], dtype=np.float64)


def main_output(outputs: Outputs) -> str:
    """The output a metric looks at: the first with floating-point rows. Raises `OptionError` if there is none."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and array.ndim >= 2:
            return name
    raise OptionError("no output has rows of floating-point numbers to compare", "Use a model with a float output")


def says_logits(name: str) -> bool:
    """Whether an output's name tells that it is scores over classes."""
    return any(word in name.lower() for word in ("logit", "score", "prob", "lm_head"))


def looks_like_logits(name: str, array: Array) -> bool:
    """Whether an output is scores over classes, by its name or because it has few columns (up to 100)."""
    unit_length = bool(np.allclose(np.linalg.norm(array[:8], axis=-1), 1.0, atol=1e-3))
    return says_logits(name) or (array.ndim == 2 and array.shape[1] <= 100 and not unit_length)


def choose_metric(name: str | None, outputs: Outputs, labels: NDArray[np.int64] | None = None) -> Metric:
    """The metric of this name, or by default: KL for logits, cosine for everything else. `Metric.why` says why.

    `outputs` and `labels` are of the original on calibration samples. Raises `OptionError` for an unknown name, or one
    that needs labels where there are none.
    """
    from rewriter.accuracy.registry import METRICS

    reference = Reference(outputs, labels)
    if name is not None:
        if name not in METRICS:
            raise OptionError(f"unknown metric {name!r}", f"Choose one of {', '.join(METRICS)}")
        if METRICS[name].needs_labels and (labels is None or not (labels >= 0).any()):
            raise OptionError(
                f"metric {name!r} needs labels", "Give the data an array 'labels', or choose another metric"
            )
        return METRICS[name](reference)
    output = main_output(outputs)
    chosen, kind = (
        ("kl", "scores over classes") if looks_like_logits(output, outputs[output]) else ("cosine", "vectors")
    )
    metric = METRICS[chosen](reference)
    metric.why = f"chosen because output {output!r} looks like {kind}"
    return metric
