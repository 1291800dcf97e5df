"""What a metric says of two models on the same samples: values, and how much each sample lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """Per-sample values of the original and of the new model, on a known range.

    All (N,) float64. `low` and `high` bound a value; `higher_is_better` tells the direction. A value that is not
    finite counts as the worst there is: a failure can never look like a success.
    """

    metric: str
    unit: str
    original: Values
    new: Values
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True
    ideal_original: bool = False

    def __post_init__(self) -> None:
        worst = self.low if self.higher_is_better else self.high
        for name in ("original", "new"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            clean = np.where(np.isfinite(values), np.clip(values, self.low, self.high), worst)
            object.__setattr__(self, name, clean)
        if self.original.shape != self.new.shape or self.original.ndim != 1:
            raise ValueError(f"paired values have shapes {self.original.shape} and {self.new.shape}")

    def __len__(self) -> int:
        return len(self.original)

    @property
    def losses(self) -> Values:
        """D_i, positive where the new model is worse; its mean is the drop."""
        return self.original - self.new if self.higher_is_better else self.new - self.original

    @property
    def loss_range(self) -> tuple[float, float]:
        """Bounds of one loss. Where the original's value is the best there is, no loss is negative."""
        width = self.high - self.low
        return (0.0 if self.ideal_original else -width), width

    @property
    def baseline(self) -> float:
        """Mean value of the original."""
        return float(self.original.mean())

    @property
    def best(self) -> float:
        """Mean value of the new model."""
        return float(self.new.mean())

    @property
    def drop(self) -> float:
        """How much was lost on the metric's own scale; negative if the new model is better."""
        return float(self.losses.mean())

    @property
    def binary(self) -> bool:
        """Whether every value is zero or one, as right and wrong are."""
        both = np.concatenate([self.original, self.new])
        return bool(np.all((both == 0.0) | (both == 1.0)))

    def by_group(self, group: NDArray[np.int64] | None) -> Paired:
        """One item per group, the mean of its samples: passages of one document are not independent of each other."""
        if group is None or len(np.unique(group)) == len(self):
            return self
        _, item = np.unique(group, return_inverse=True)
        counts = np.bincount(item)
        return Paired(
            self.metric,
            self.unit,
            np.bincount(item, self.original) / counts,
            np.bincount(item, self.new) / counts,
            self.low,
            self.high,
            self.higher_is_better,
            self.ideal_original,
        )


def join(parts: Sequence[Paired]) -> Paired:
    """Batches of one metric, put together."""
    first = parts[0]
    return Paired(
        first.metric,
        first.unit,
        np.concatenate([part.original for part in parts]),
        np.concatenate([part.new for part in parts]),
        first.low,
        first.high,
        first.higher_is_better,
        first.ideal_original,
    )
