"""Statistics of one sub-block: Gram matrices in float64, all that a calibrated pass may look at.

Computed by `rewriter.calibration` in one streamed pass (float32 products of at most 4,096 tokens, accumulated in
float64); padding tokens never enter. Statistics compare by identity, so that passes may remember what they
derived from one object. Notation as in `rewriter.core.site`; the target T is what
the output of the block should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array64 = NDArray[np.float64]

# What a pass may ask for beyond the regression of the output projection (`Pass.requires`).
Detail = Literal["heads", "source", "products", "joint_keys", "mixed", "distance", "ranges"]
SINKS = 4  # the first keys, whose share of the attention is not counted by distance (Xiao et al. 2024)


@dataclass(frozen=True, eq=False)
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

    @property
    def spread(self) -> float:
        """``||target - mean(target)||^2``: what a constant alone would lose."""
        total = self.cross[-1]
        return float(self.energy - total @ total / max(self.tokens, 1))

    def loss_share(self, weight: Array64) -> float:
        """The loss as a share of `spread`, corrected for fitting `weight` on these very tokens.

        The factor ``1 / (1 - columns / tokens)^2`` is generalised cross-validation (Golub, Heath and Wahba 1979); it
        makes small and large samples comparable. Infinite when there are too few tokens to say anything.
        """
        room = 1.0 - self.gram.shape[0] / max(self.tokens, 1)
        if room <= 0.0 or self.spread <= 0.0:
            return float("inf")
        return max(self.loss(weight), 0.0) / self.spread / room**2

    def map(self, features: NDArray[Any]) -> Regression:
        """The regression of features changed linearly: `features` is (F, F') or, if one-dimensional, picks columns."""
        if features.ndim == 1:
            return self.select([int(c) for c in features])
        matrix = np.zeros((features.shape[0] + 1, features.shape[1] + 1))
        matrix[:-1, :-1] = features
        matrix[-1, -1] = 1.0
        return Regression(matrix.T @ self.gram @ matrix, matrix.T @ self.cross, self.energy, self.tokens)

    def __add__(self, other: Regression) -> Regression:
        return Regression(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.tokens + other.tokens
        )


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """Of one attention site.

    `query_HDD` and `key_GDD` are per-head Grams of queries and of keys minus the mean over the valid keys of their own
    sequence (softmax does not see row shifts); `features` regresses the concatenated head results (H*D columns, head
    major) onto the block's output. The rest is there if a pass asked for it:

    `source` regresses the block's input onto its output. `products_HDD` sums, over sequences, a head's Gram of queries
    times that of its centred keys, entry by entry. `joint_key` is the Gram of the centred keys of all heads side by
    side, (G*D, G*D). `mixed_HKK` is for every query head the Gram of what its probabilities make of the values of all
    value heads, (K = G*D). `distance_HT` is the mean share of the attention by distance in tokens, sinks left out.
    """

    query_HDD: Array64
    key_GDD: Array64
    features: Regression
    source: Regression | None = None
    products_HDD: Array64 | None = None
    joint_key: Array64 | None = None
    mixed_HKK: Array64 | None = None
    distance_HT: Array64 | None = None

    @property
    def regression(self) -> Regression:
        """What the output projection is fitted on."""
        return self.features

    def keep_heads(self, heads: Sequence[int], key_heads: Sequence[int]) -> AttentionStatistics:
        """Only these query heads, and only these heads of the keys; the features stay."""
        own, dim = list(heads), self.key_GDD.shape[-1]
        columns = [group * dim + column for group in key_heads for column in range(dim)]
        return replace(
            self,
            query_HDD=self.query_HDD[own],
            key_GDD=self.key_GDD[list(key_heads)],
            products_HDD=None if self.products_HDD is None else self.products_HDD[own],
            joint_key=None if self.joint_key is None else self.joint_key[np.ix_(columns, columns)],
            mixed_HKK=None,
            distance_HT=None if self.distance_HT is None else self.distance_HT[own],
        )

    def with_regression(self, regression: Regression) -> AttentionStatistics:
        """The same Grams of queries and keys, other features."""
        return replace(self, features=regression)


@dataclass(frozen=True, eq=False)
class FeedForwardStatistics:
    """Of one feed-forward site: the hidden activations (after nonlinearity and gate) regressed onto the output."""

    hidden: Regression

    @property
    def regression(self) -> Regression:
        """What the output projection is fitted on."""
        return self.hidden

    def with_regression(self, regression: Regression) -> FeedForwardStatistics:
        """Other hidden activations."""
        return FeedForwardStatistics(regression)


Statistics = AttentionStatistics | FeedForwardStatistics
