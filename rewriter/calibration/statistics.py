"""Streaming Gram statistics: rows in, `rewriter.core.statistics` out, memory independent of how many rows there were.

Products are taken in the rows' own dtype over chunks of at most 4,096 tokens and summed in float64: with float32 rows
that agrees with float64 arithmetic to about 1e-6 of the largest entry at a fraction of its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas
from torch import Tensor

from rewriter.core.statistics import Array64, Regression

CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class StreamRegression:
    """Statistics of ``[features | 1]`` against two targets at once: the output, and how far the residual drifted.

    ``target(alpha)`` regresses onto ``output + alpha * residual`` (residual: teacher's minus student's stream) for any
    alpha without another look at the data.
    """

    gram: Array64
    cross_output: Array64
    cross_residual: Array64
    energies: Array64  # <output, output>, <output, residual>, <residual, residual>
    tokens: int

    def target(self, alpha: float) -> Regression:
        """The regression onto ``output + alpha * residual``."""
        energy = float(self.energies @ np.array([1.0, 2.0 * alpha, alpha * alpha]))
        return Regression(self.gram, self.cross_output + alpha * self.cross_residual, energy, self.tokens)

    def map(self, features: NDArray[Any]) -> StreamRegression:
        """The same for linearly changed features, see `Regression.map`."""
        output = Regression(self.gram, self.cross_output, 0.0, self.tokens).map(features)
        residual = Regression(self.gram, self.cross_residual, 0.0, self.tokens).map(features)
        return StreamRegression(output.gram, output.cross, residual.cross, self.energies, self.tokens)

    def __add__(self, other: StreamRegression) -> StreamRegression:
        return StreamRegression(
            self.gram + other.gram,
            self.cross_output + other.cross_output,
            self.cross_residual + other.cross_residual,
            self.energies + other.energies,
            self.tokens + other.tokens,
        )


class RegressionAccumulator:
    """Takes rows as they come and keeps only sums.

    What is summed is the difference of the output to ``[features | 1] @ weights`` (F+1, C): near the weights that
    made it the output is known almost exactly, so that losses far below float32 rounding of the output survive.
    """

    def __init__(self, weights: Array64) -> None:
        self._weights = weights
        self._around = torch.from_numpy(weights)
        columns, width = weights.shape
        self._gram = np.zeros((columns, columns))
        self._cross_error, self._cross_residual = np.zeros((columns, width)), np.zeros((columns, width))
        self._energies = np.zeros(3)  # <error, error>, <error, residual>, <residual, residual>
        self._waiting: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self._held = 0
        self._tokens = 0

    def add(self, features: Tensor, output: Tensor | None, residual: Tensor | None = None) -> None:
        """Rows of features (N, F), what the output should be (N, C), and the drift of the residual (N, C).

        Without `output` it is what the weights make of the features, without `residual` there is no drift; either is
        given always or never.
        """
        for start in range(0, len(features), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            if self._held + len(features[part]) > CHUNK_TOKENS:
                self._flush()
            wanted, drift = (None if rows is None else rows[part] for rows in (output, residual))
            self._waiting.append((features[part], wanted, drift))
            self._held += len(features[part])

    def result(self) -> StreamRegression:
        """What was seen so far. Raises `ValueError` if that is nothing."""
        self._flush()
        if not self._tokens:
            raise ValueError("no rows were seen")
        gram, weights = np.triu(self._gram) + np.triu(self._gram, 1).T, self._weights
        made = gram @ weights
        energies = self._energies.copy()
        energies[0] += float(np.sum(weights * (made + 2.0 * self._cross_error)))
        energies[1] += float(np.sum(weights * self._cross_residual))
        return StreamRegression(gram, made + self._cross_error, self._cross_residual.copy(), energies, self._tokens)

    def _flush(self) -> None:
        if not self._waiting:
            return
        features, output, residual = (_joined(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._held = [], 0
        assert features is not None
        wide = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
        self._tokens += len(features)
        self._gram += _upper_gram(wide.numpy())
        error = None if output is None else output - wide @ self._around.to(wide.dtype)
        if error is not None:
            self._cross_error += (wide.T @ error).numpy()
            self._energies[0] += _dot(error, error)
        if residual is not None:
            self._cross_residual += (wide.T @ residual).numpy()
            self._energies[1] += 0.0 if error is None else _dot(error, residual)
            self._energies[2] += _dot(residual, residual)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right.double()).sum())


def _upper_gram(rows: NDArray[Any]) -> NDArray[Any]:
    """The upper triangle of ``rows' rows``: a symmetric rank-k update takes less than half the time of a product."""
    update = blas.ssyrk if rows.dtype == np.float32 else blas.dsyrk
    return np.asarray(update(1.0, rows.T))


class HeadGramAccumulator:
    """Sums of ``x' x`` per head over tokens."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, rows_NGD: Tensor) -> None:
        """Rows of every head, (N, G, D)."""
        for start in range(0, len(rows_NGD), CHUNK_TOKENS):
            part = rows_NGD[start : start + CHUNK_TOKENS].transpose(0, 1)
            gram = (part.transpose(1, 2) @ part).double()
            self._total = gram if self._total is None else self._total + gram

    def result(self) -> Array64:
        """The Grams, (G, D, D). Raises `ValueError` if nothing was seen."""
        if self._total is None:
            raise ValueError("no rows were seen")
        return np.asarray(self._total.numpy())


def valid_keys(bias: Tensor | None, batch: int, keys: int) -> Tensor:
    """Which key tokens are no padding, (B, T) bool: some query may attend to them.

    `bias` broadcasts to (B, H, S, T); boolean means allowed where True, additive means allowed where it is not hugely
    negative (more than 5,000 below its largest finite value, as masks are and position biases are not).
    """
    if bias is None:
        return torch.ones(batch, keys, dtype=torch.bool)
    if bias.dtype == torch.bool:
        allowed = bias
    else:
        finite = bias[torch.isfinite(bias)]
        top = float(finite.max()) if finite.numel() else 0.0
        allowed = bias > top - 5000.0
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + tuple(allowed.shape))
    return allowed.any(dim=2).any(dim=1).expand(batch, keys)


def centred(keys_BTGD: Tensor, valid_BT: Tensor) -> Tensor:
    """Keys minus their mean over the valid tokens of their own sequence, (B, T, G, D)."""
    weight = valid_BT.to(keys_BTGD.dtype)[:, :, None, None]
    mean = (keys_BTGD * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    return keys_BTGD - mean
