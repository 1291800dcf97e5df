"""Chooses how far the output projection of a rewritten site is fitted anew, by its loss on data held back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewriter.calibration.statistics import StreamRegression
from rewriter.core.linalg import penalised, ridge_level, solve_gram
from rewriter.core.statistics import Array64

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
ALPHAS = (0.0, 0.5, 1.0)
_WORTH = 1e-3  # a fit must take at least this share off the held-back loss to replace the weights


@dataclass(frozen=True)
class Fit:
    """The weights chosen, (F+1, C), and why: shares of the target's spread lost on the held-back data.

    `alpha` says how much of the drift of the residual stream is made up for, `ridge` how strongly the fit is pulled
    towards the weights before; both are NaN when those were kept.
    """

    weights: Array64
    loss_before: float
    loss_after: float
    alpha: float
    ridge: float

    @property
    def kept(self) -> bool:
        """Whether the weights are those from before."""
        return bool(np.isnan(self.alpha))


def fit(
    calibrate: StreamRegression,
    select: StreamRegression,
    current: Array64,
    drifted: bool,
    refit: bool = False,
    ridges: tuple[float, ...] = RIDGES,
    alphas: tuple[float, ...] = ALPHAS,
) -> Fit:
    """Fit on `calibrate` for every alpha and ridge, score on `select`, keep `current` unless something is better.

    Every candidate is scored against ``output + drift``: what brings the student's stream back to the teacher's.
    `drifted` is False where the streams are still equal (alpha does not matter). With `refit` the winner is fitted
    once more on both data together.
    """
    judge = select.target(1.0)
    spread = max(judge.spread, 1e-300)
    before = judge.loss(current) / spread
    best = Fit(current, before, before, float("nan"), float("nan"))
    for ridge in ridges:
        for alpha, weights in _solutions(calibrate, current, ridge, alphas if drifted else (0.0,)):
            loss = judge.loss(weights) / spread
            if np.isfinite(loss) and loss < min(best.loss_after, before * (1.0 - _WORTH)):
                best = Fit(weights, before, loss, alpha, ridge)
    if refit and not best.kept:
        ((_, weights),) = _solutions(calibrate + select, current, best.ridge, (best.alpha,))
        return Fit(weights, before, best.loss_after, best.alpha, best.ridge)
    return best


def _solutions(
    regression: StreamRegression, current: Array64, ridge: float, alphas: tuple[float, ...]
) -> list[tuple[float, Array64]]:
    """`linalg.ridge_towards` for several alphas with one factorisation."""
    gram = penalised(regression.gram, ridge_level(regression.gram, ridge))
    residual = regression.cross_output - regression.gram @ current
    moved = [residual + alpha * regression.cross_residual for alpha in alphas]
    solved = solve_gram(gram, np.concatenate(moved, axis=1))
    return [(alpha, current + part) for alpha, part in zip(alphas, np.split(solved, len(alphas), axis=1), strict=True)]
