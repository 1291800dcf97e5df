"""Metrics that compare with the original itself and need no labels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.metrics import Array, Metric, Outputs, Reference
from rewriter.accuracy.paired import Values

BANK_SIZE = 512
NEIGHBOURS = 10
TINY = 1e-12


class Cosine(Metric):
    """Cosine between the original's output vector and the new one; below zero counts as zero."""

    name: ClassVar[str] = "cosine"
    unit: ClassVar[str] = "cosine"
    meaning: ClassVar[str] = "mean cosine between the original's output and the new one, 1 = same direction"

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) ones and cosines; of token outputs the mean over tokens that are not padding."""
        a, b = self._rows(original), self._rows(new)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = per_sample((a * b).sum(-1) / np.maximum(norms, TINY), mask)
        return np.ones_like(cosine), cosine


class Agreement(Metric):
    """Whether the largest column is the same: prediction flips, turned round."""

    name: ClassVar[str] = "agreement"
    unit: ClassVar[str] = "share"
    meaning: ClassVar[str] = "share of predictions that equal the original's"

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) ones and agreements (shares of tokens for token outputs)."""
        a, b = self._rows(original), self._rows(new)
        same = (a.argmax(-1) == b.argmax(-1)) & np.isfinite(b).all(-1)
        agreement = per_sample(same.astype(np.float64), mask)
        return np.ones_like(agreement), agreement


class KullbackLeibler(Metric):
    """KL(original || new) of the softmaxed scores, capped at one nat so that its mean can be bounded."""

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    meaning: ClassVar[str] = "mean KL divergence from the original's distribution, capped at 1 nat; 0 = same"
    higher_is_better: ClassVar[bool] = False

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) zeros and divergences in nats; of token outputs the mean over tokens, each capped."""
        log_p, log_q = log_softmax(self._rows(original)), log_softmax(self._rows(new))
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        capped = np.where(np.isfinite(divergence), np.clip(divergence, 0.0, 1.0), 1.0)
        divergence = per_sample(capped, mask)
        return np.zeros_like(divergence), divergence


class RelativeError(Metric):
    """Distance from the original's outputs relative to their size, over all outputs of equal shape; capped at one.

    Caches whose sizes were changed cannot be compared, and are judged by what is computed from them.
    """

    name: ClassVar[str] = "relative_error"
    unit: ClassVar[str] = "share"
    meaning: ClassVar[str] = "mean of |new - original| / |original| over all float outputs, capped at 1; 0 = same"
    higher_is_better: ClassVar[bool] = False

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) zeros and relative errors."""
        names = [name for name, array in original.items() if array.dtype.kind == "f" and array.ndim >= 1]
        rows = len(original[self.output])
        distance, size = np.zeros(rows), np.zeros(rows)
        for name in names:
            if original[name].shape != new[name].shape:
                continue
            a, b = (without_padding(outputs[name], mask).reshape(rows, -1) for outputs in (original, new))
            distance += ((b - a) ** 2).sum(1)
            size += (a**2).sum(1)
        return np.zeros(rows), np.sqrt(distance) / np.maximum(np.sqrt(size), TINY)


class Banked(Metric):
    """Metrics that look at a sample through its similarity to a bank of the original's own vectors."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        rows = self._pooled(reference.outputs, None)
        # Evenly spaced samples: deterministic, and spread over whatever order the data has.
        self.bank_MC = rows[np.unique(np.linspace(0, len(rows) - 1, min(BANK_SIZE, len(rows))).astype(int))]

    def _pooled(self, outputs: Outputs, mask: Array | None) -> Array:
        """(N, C) unit vectors; token outputs are averaged over tokens that are not padding."""
        rows = self._rows(outputs)
        pooled = (
            np.stack([per_sample(column, mask) for column in np.moveaxis(rows, -1, 0)], -1) if rows.ndim > 2 else rows
        )
        return np.asarray(pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), TINY))

    def _profiles(self, outputs: Outputs, mask: Array | None) -> Array:
        return np.asarray(np.nan_to_num(self._pooled(outputs, mask)) @ self.bank_MC.T)


class Similarity(Banked):
    """Representational similarity (Kriegeskorte et al. 2008), one sample at a time.

    Each sample has a profile: its cosines to a fixed bank of the original's vectors. The value is Pearson's correlation
    of the profile under the original with that under the new model; below zero counts as zero.
    """

    name: ClassVar[str] = "similarity"
    unit: ClassVar[str] = "correlation"
    meaning: ClassVar[str] = (
        "mean correlation of each sample's similarities to a bank of references, 1 = same structure"
    )

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) ones and correlations."""
        a, b = (centred(self._profiles(outputs, mask)) for outputs in (original, new))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        correlation = (a * b).sum(1) / np.maximum(norms, TINY)
        return np.ones_like(correlation), correlation


class NearestNeighbours(Banked):
    """Share of the ten nearest references that stay the same: what a search index built earlier would notice."""

    name: ClassVar[str] = "knn"
    unit: ClassVar[str] = "share"
    meaning: ClassVar[str] = "share of each sample's 10 nearest references that stay the same"

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) ones and shares."""
        k = min(NEIGHBOURS, len(self.bank_MC))
        a, b = (np.argsort(-self._profiles(outputs, mask), axis=1, kind="stable")[:, :k] for outputs in (original, new))
        share = np.array([len(np.intersect1d(x, y)) / k for x, y in zip(a, b, strict=True)])
        return np.ones_like(share), share


def per_sample(values: Array, mask: Array | None) -> Values:
    """(N, ...) to (N,): the mean over further axes, of token axes only where `mask` (N, S) is not zero."""
    if values.ndim == 1:
        return np.asarray(values, dtype=np.float64)
    if mask is None or mask.shape != values.shape[:2]:
        return np.asarray(values.reshape(len(values), -1).mean(1), dtype=np.float64)
    weight_NS = (mask != 0).astype(np.float64)
    flat_NS = values.reshape(*values.shape[:2], -1).mean(-1)
    total = np.where(weight_NS > 0, flat_NS, 0.0).sum(1)
    return np.asarray(total / np.maximum(weight_NS.sum(1), 1.0))


def without_padding(values: Array, mask: Array | None) -> Array:
    """Values in float64, those of padding tokens set to zero where the second axis is tokens."""
    values = np.asarray(values, dtype=np.float64)
    if mask is None or values.ndim < 3 or mask.shape != values.shape[:2]:
        return values
    return np.where((mask != 0).reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0.0)


def log_softmax(scores: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def centred(rows: Array) -> Array:
    """Rows without their mean."""
    return np.asarray(rows - rows.mean(1, keepdims=True))
