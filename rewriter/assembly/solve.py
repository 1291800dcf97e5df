"""Chooses how far the output projection of a rewritten site is fitted anew, by its loss on data held back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewriter.calibration.statistics import StreamRegression
from rewriter.core.linalg import penalised, ridge_level, solve_gram
from rewriter.core.statistics import Array64, Regression

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
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
) -> Fit:
    """Fit on `calibrate` with every ridge, score on `select`, keep `current` unless something is better.

    The fit's target is ``output + alpha * drift``; candidates are scored against ``output + drift``, which brings the
    student's stream back to the teacher's. That score is a parabola in alpha, so its best value in [0, 1] is exact.
    `drifted` is False where the streams are still equal. With `refit` the winner is fitted once more on both data.
    """
    judge = select.target(1.0)
    spread = max(judge.spread, 1e-300)
    before = judge.loss(current) / spread
    best = Fit(current, before, before, float("nan"), float("nan"))
    for ridge in ridges:
        base, step = _directions(calibrate, current, ridge, drifted)
        alpha, loss = _best_alpha(judge, base, step)
        if np.isfinite(loss) and loss / spread < min(best.loss_after, before * (1.0 - _WORTH)):
            best = Fit(base if step is None else base + alpha * step, before, loss / spread, alpha, ridge)
    if refit and not best.kept:
        base, step = _directions(calibrate + select, current, best.ridge, drifted)
        weights = base if step is None else base + best.alpha * step
        return Fit(weights, before, best.loss_after, best.alpha, best.ridge)
    return best


def _directions(
    regression: StreamRegression, current: Array64, ridge: float, drifted: bool
) -> tuple[Array64, Array64 | None]:
    """`linalg.ridge_towards` for any alpha: the solution is ``base + alpha * step``, from one factorisation."""
    gram = penalised(regression.gram, ridge_level(regression.gram, ridge))
    right = regression.cross_output - regression.gram @ current
    if not drifted:
        return current + solve_gram(gram, right), None
    solved = solve_gram(gram, np.concatenate([right, regression.cross_residual], axis=1))
    width = right.shape[1]
    return current + solved[:, :width], solved[:, width:]


def _best_alpha(judge: Regression, base: Array64, step: Array64 | None) -> tuple[float, float]:
    """The alpha in [0, 1] with the least loss of ``base + alpha * step``, and that loss."""
    if step is None:
        return 0.0, judge.loss(base)
    residual = judge.gram @ base - judge.cross
    at_zero = float(np.sum(base * (residual - judge.cross))) + judge.energy
    slope = 2.0 * float(np.sum(residual * step))
    bend = float(np.sum(step * (judge.gram @ step)))
    alpha = float(np.clip(-slope / (2.0 * bend), 0.0, 1.0)) if bend > 0.0 else 0.0
    return alpha, at_zero + slope * alpha + bend * alpha**2
