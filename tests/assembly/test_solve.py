from __future__ import annotations

import numpy as np

from rewriter.assembly.solve import fit
from rewriter.calibration.statistics import StreamRegression
from rewriter.core.linalg import ridge_towards


def stream(seed: int, tokens: int, truth: np.ndarray, noise: float, drift: float = 0.0) -> StreamRegression:
    rng = np.random.default_rng(seed)
    rows = np.hstack([rng.normal(size=(tokens, truth.shape[0] - 1)), np.ones((tokens, 1))])
    output = rows @ truth + noise * rng.normal(size=(tokens, truth.shape[1]))
    residual = drift * (rows[:, :1] * np.ones(truth.shape[1]) + noise * rng.normal(size=output.shape))
    energies = np.array([np.sum(output**2), np.sum(output * residual), np.sum(residual**2)])
    return StreamRegression(rows.T @ rows, rows.T @ output, rows.T @ residual, energies, tokens)


TRUTH = np.random.default_rng(9).normal(size=(13, 4))
START = np.zeros_like(TRUTH)


def test_finds_the_truth_with_enough_data() -> None:
    found = fit(stream(0, 5000, TRUTH, 0.1), stream(1, 1000, TRUTH, 0.1), START, drifted=False)
    assert not found.kept and found.alpha == 0.0
    assert found.loss_after < 0.01 < found.loss_before
    np.testing.assert_allclose(found.weights, TRUTH, atol=0.02)


def test_keeps_good_weights_when_data_is_scarce() -> None:
    found = fit(stream(2, 14, TRUTH, 3.0), stream(3, 2000, TRUTH, 3.0), TRUTH, drifted=False)
    assert found.loss_after <= found.loss_before
    assert np.linalg.norm(found.weights - TRUTH) < 0.5 * np.linalg.norm(TRUTH)


def test_keeps_the_very_weights_when_nothing_is_better() -> None:
    found = fit(stream(4, 30, TRUTH, 5.0), stream(5, 200, TRUTH, 0.01), TRUTH, drifted=False)
    assert found.kept and np.isnan(found.ridge) and found.weights is TRUTH


def test_drift_is_made_up_for() -> None:
    calibrate, select = stream(6, 4000, TRUTH, 0.1, 1.0), stream(7, 1000, TRUTH, 0.1, 1.0)
    absorbed, ignored = (fit(calibrate, select, TRUTH, drifted) for drifted in (True, False))
    assert absorbed.alpha > 0.9 and absorbed.loss_after < 0.3 * ignored.loss_after


def test_alpha_is_the_best_there_is() -> None:
    calibrate, select = stream(8, 60, TRUTH, 1.0, 0.5), stream(9, 60, TRUTH, 1.0, 0.3)
    found = fit(calibrate, select, START, drifted=True, ridges=(1e-2,))
    judge = select.target(1.0)
    tried = [judge.loss(ridge_towards(calibrate.target(alpha), START, 1e-2)) for alpha in np.linspace(0, 1, 21)]
    assert found.loss_after <= min(tried) / judge.spread + 1e-12


def test_refit_uses_both() -> None:
    calibrate, select = stream(10, 300, TRUTH, 0.5), stream(11, 300, TRUTH, 0.5)
    found = fit(calibrate, select, START, drifted=False, refit=True)
    np.testing.assert_allclose(found.weights, ridge_towards((calibrate + select).target(0.0), START, found.ridge))
