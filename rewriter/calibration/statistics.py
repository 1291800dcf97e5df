"""Streaming Gram statistics: rows in, `rewriter.core.statistics` out, memory independent of how many rows there were.

Products are taken in the rows' own dtype over chunks of at most 4,096 tokens and summed in float64: with float32 rows
that agrees with float64 arithmetic to about 1e-6 of the largest entry at a fraction of its price.
"""

from __future__ import annotations

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
    """Takes rows as they come and keeps only sums."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._held = 0
        self._sums: tuple[Array64, Array64, Array64] | None = None
        self._energies = np.zeros(3)
        self._tokens = 0

    def add(self, features: Tensor, output: Tensor, residual: Tensor | None = None) -> None:
        """Rows of features (N, F) with their output (N, C) and, if there is one, residual difference (N, C)."""
        for start in range(0, len(features), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            if self._held + len(features[part]) > CHUNK_TOKENS:
                self._flush()
            self._waiting.append((features[part], output[part], None if residual is None else residual[part]))
            self._held += len(features[part])

    def result(self) -> StreamRegression:
        """What was seen so far. Raises `ValueError` if that is nothing."""
        self._flush()
        if self._sums is None:
            raise ValueError("no rows were seen")
        upper, output, residual = self._sums
        gram = np.triu(upper) + np.triu(upper, 1).T
        return StreamRegression(gram, output.copy(), residual.copy(), self._energies.copy(), self._tokens)

    def _flush(self) -> None:
        if not self._waiting:
            return
        features = torch.cat([part[0] for part in self._waiting])
        output = torch.cat([part[1] for part in self._waiting])
        drifted = any(part[2] is not None for part in self._waiting)
        drift = [torch.zeros_like(part[1]) if part[2] is None else part[2] for part in self._waiting]
        self._waiting, self._held = [], 0
        wide = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
        if self._sums is None:
            columns, width = wide.shape[1], output.shape[1]
            self._sums = np.zeros((columns, columns)), np.zeros((columns, width)), np.zeros((columns, width))
        gram, cross_output, cross_residual = self._sums
        gram += _upper_gram(wide.numpy())
        cross_output += (wide.T @ output).numpy()
        wanted = output.double()
        self._energies[0] += float((wanted * wanted).sum())
        self._tokens += len(features)
        if drifted:
            residual = torch.cat(drift)
            cross_residual += (wide.T @ residual).numpy()
            self._energies[1:] += [float((other * residual.double()).sum()) for other in (wanted, residual.double())]


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
