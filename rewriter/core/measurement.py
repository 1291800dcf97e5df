"""Measurements: samples with their unit, intervals, and a verdict on whether they decide anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

# The range of n values covers their median with probability 1 - 2^(1 - n): no 95 % interval exists below 6.
ENOUGH_BLOCKS = 6


@dataclass(frozen=True)
class Interval:
    """A median with a two-sided bootstrap interval. The unit is in the name of the field that holds it.

    `samples` says how many values it comes from; 0 when it was not computed from values here.
    """

    median: float
    low: float
    high: float
    samples: int = field(default=0, compare=False)

    def as_dict(self) -> dict[str, float]:
        """For reports."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Measurement:
    """Blocks of latencies of one subject, taken in turn with its rivals so that block i of all of them is comparable.

    `blocks_s[i]` holds the seconds of single runs in block i, `starts[i]` which start of the process it comes from
    (empty: all from one).
    """

    subject: str
    blocks_s: tuple[tuple[float, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: tuple[int, ...] = ()

    @property
    def block_medians_s(self) -> tuple[float, ...]:
        """The median of each block."""
        return tuple(float(np.median(block)) for block in self.blocks_s)

    def latency_s(self, confidence: float = 0.95) -> Interval:
        """Median over blocks with a bootstrap interval; NaN bounds never arise, an empty measurement is an error."""
        return bootstrap_median(self.block_medians_s, confidence, groups=self.starts)


class Decision(StrEnum):
    """Outcome of a comparison. Unknown is a result of its own and never wins."""

    FASTER = "faster"
    SLOWER = "slower"
    INCONCLUSIVE = "inconclusive"


def bootstrap_median(
    values: Sequence[float], confidence: float = 0.95, draws: int = 2000, groups: Sequence[int] = ()
) -> Interval:
    """Percentile bootstrap of the median, deterministic (fixed seed).

    Values with the same entry in `groups` share their luck (one process): groups are drawn first, then values in them.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.all(np.isfinite(array)):
        raise ValueError("an interval needs at least one finite value")
    rng = np.random.default_rng(0)
    labels = np.asarray(groups if len(groups) else np.zeros(array.size), dtype=np.int64)
    medians = np.median(array[_drawn(rng, labels, draws)], axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(medians, [tail, 1.0 - tail])
    return Interval(float(np.median(array)), float(low), float(high), int(array.size))


def _drawn(rng: np.random.Generator, labels: NDArray[np.int64], draws: int) -> NDArray[np.int64]:
    """Indices of `draws` samples, each of about as many values as there are labels."""
    names, sizes = np.unique(labels, return_counts=True)
    order, first = np.argsort(labels, kind="stable"), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    each = -(-labels.size // names.size)
    group = np.repeat(rng.integers(0, names.size, (draws, names.size)), each, axis=1)
    return np.asarray(order[first[group] + (rng.random(group.shape) * sizes[group]).astype(np.int64)])


def speedup(baseline: Measurement, candidate: Measurement, confidence: float = 0.95) -> Interval:
    """How many times faster the candidate is: the median of paired block ratios, with its interval."""
    pairs = list(zip(baseline.block_medians_s, candidate.block_medians_s, strict=False))
    return bootstrap_median([base / new for base, new in pairs], confidence, groups=baseline.starts[: len(pairs)])


def decide(ratio: Interval, margin: float = 0.0) -> Decision:
    """FASTER only if the whole interval lies above 1 + margin; SLOWER only if all of it lies below 1.

    Fewer samples than an interval needs decide nothing, however narrow it looks.
    """
    if 0 < ratio.samples < ENOUGH_BLOCKS:
        return Decision.INCONCLUSIVE
    if ratio.low > 1.0 + margin:
        return Decision.FASTER
    return Decision.SLOWER if ratio.high < 1.0 else Decision.INCONCLUSIVE
