"""Statistics of one sub-block: Gram matrices in float64, all that a calibrated pass may look at.

Computed by `rewriter.calibration` in one streamed pass (float32 products of at most 4,096 tokens, accumulated in
float64); padding tokens never enter. Notation as in `rewriter.core.site`; the target T is what
the output of the block should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array64 = NDArray[np.float64]


@dataclass(frozen=True)
class Regression:
    """Sufficient statistics of ``[features | 1] -> target``: what any re-solve of an output projection needs.

    `gram` is (F+1, F+1) with the ones-column last, `cross` is (F+1, C), `energy` is the sum of squared targets,
    `tokens` how many rows were seen. The loss of any weights follows without looking at data again.
    """

    gram: Array64
    cross: Array64
    energy: float
    tokens: int

    def loss(self, weight: Array64) -> float:
        """``||[features | 1] @ weight - target||^2`` for weight (F+1, C), bias in the last row."""
        return float(np.sum(weight * (self.gram @ weight)) - 2.0 * np.sum(weight * self.cross) + self.energy)

    def select(self, columns: Array64 | list[int]) -> Regression:
        """The same regression on some of the features (the ones-column is always kept)."""
        kept = [*(int(c) for c in columns), self.gram.shape[0] - 1]
        return Regression(self.gram[np.ix_(kept, kept)], self.cross[kept], self.energy, self.tokens)

    def __add__(self, other: Regression) -> Regression:
        return Regression(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.tokens + other.tokens
        )


@dataclass(frozen=True)
class AttentionStatistics:
    """Of one attention site.

    `query_HDD` and `key_GDD` are per-head Grams of queries and of keys minus the mean over the valid keys of their own
    sequence (softmax does not see row shifts); `features` regresses the concatenated head results (H*D columns, head
    major) onto the block's output; `example` counts tokens.
    """

    query_HDD: Array64
    key_GDD: Array64
    features: Regression


@dataclass(frozen=True)
class FeedForwardStatistics:
    """Of one feed-forward site: the hidden activations (after nonlinearity and gate) regressed onto the output."""

    hidden: Regression


Statistics = AttentionStatistics | FeedForwardStatistics
