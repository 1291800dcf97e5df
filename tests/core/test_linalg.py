from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.core.linalg import cholesky_upper, ridge_towards, solve_gram
from rewriter.core.obs import Elimination, RidgeProblem, improve
from rewriter.core.statistics import Regression


def problem(seed: int, features: int = 12, outputs: int = 3, tokens: int = 80) -> tuple[Regression, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(tokens, features)) @ rng.normal(size=(features, features)) + rng.normal(size=features)
    wide = np.hstack([rows, np.ones((tokens, 1))])
    target = rng.normal(size=(tokens, outputs)) + rows @ rng.normal(size=(features, outputs))
    return Regression(wide.T @ wide, wide.T @ target, float(np.sum(target**2)), tokens), rng.normal(
        size=(features + 1, outputs)
    )


def test_cholesky_of_full_rank() -> None:
    gram = problem(0)[0].gram
    root = cholesky_upper(gram, 0.0)
    np.testing.assert_allclose(root.T @ root, gram, rtol=1e-10)


def test_cholesky_survives_dead_and_duplicate_channels() -> None:
    gram = np.diag([1.0, 0.0, 2.0])
    gram[0, 2] = gram[2, 0] = np.sqrt(2.0)
    root = cholesky_upper(gram, 0.0)
    assert np.isfinite(root).all() and np.linalg.matrix_rank(root) == 3
    np.testing.assert_allclose(root.T @ root, gram, atol=1e-8)


def test_solve_of_a_singular_gram_is_least_squares() -> None:
    gram = np.array([[1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(gram @ solve_gram(gram, np.array([[2.0], [2.0]])), [[2.0], [2.0]], atol=1e-9)


def test_ridge_limits() -> None:
    regression, current = problem(1)
    far = ridge_towards(regression, current, 1e12)
    np.testing.assert_allclose(far[:-1], current[:-1], atol=1e-6)
    near = ridge_towards(regression, current, 1e-14)
    np.testing.assert_allclose(near, np.linalg.solve(regression.gram, regression.cross), rtol=1e-6, atol=1e-8)


def test_ridge_without_features_is_the_mean() -> None:
    regression = Regression(np.array([[4.0]]), np.array([[8.0, 2.0]]), 20.0, 4)
    np.testing.assert_allclose(ridge_towards(regression, np.zeros((1, 2)), 1.0), [[2.0, 0.5]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([1e-4, 1e-2, 1.0]), width=st.sampled_from([1, 2, 3]))
def test_scores_of_obs_are_exact_at_every_level(seed: int, ridge: float, width: int) -> None:
    regression, current = problem(seed)
    own = RidgeProblem.of(regression, current, ridge)
    blocks = np.random.default_rng(seed).permutation(12).reshape(-1, width)
    elimination = Elimination(own, blocks)
    loss = own.loss(np.arange(12))
    while len(elimination.alive) > 1:
        scores = elimination.scores()
        cheapest = int(np.argmin(scores))
        added = elimination.remove(elimination.alive[[cheapest]])
        np.testing.assert_allclose(added, scores[cheapest], rtol=1e-7)
        loss += added
        np.testing.assert_allclose(loss, own.loss(np.sort(blocks[elimination.alive].reshape(-1))), rtol=1e-7)


def test_restricted_weights_minimise_the_penalised_loss() -> None:
    regression, current = problem(2)
    own = RidgeProblem.of(regression, current, 1e-2)
    columns = np.array([0, 3, 4, 9])
    weights = np.zeros_like(current)
    weights[np.append(columns, 12)] = own.solve(columns)
    level = 1e-2 * np.trace(regression.gram[:12, :12]) / 12

    def objective(w: np.ndarray) -> float:
        return regression.loss(w) + level * float(np.sum((w[:-1] - current[:-1]) ** 2))

    np.testing.assert_allclose(objective(weights), own.loss(columns), rtol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = weights.copy()
        other[columns] += 1e-3 * rng.normal(size=(4, 3))
        assert objective(other) > objective(weights)


def test_removing_together_is_removing_in_turn() -> None:
    own = RidgeProblem.of(*problem(3), 1e-3)
    blocks = np.arange(12).reshape(6, 2)
    together, apart = Elimination(own, blocks), Elimination(own, blocks)
    added = together.remove(np.array([4, 1]))
    np.testing.assert_allclose(added, apart.remove(np.array([1])) + apart.remove(np.array([4])), rtol=1e-8)
    np.testing.assert_allclose(together.scores(), apart.scores(), rtol=1e-7)


def test_swaps_never_hurt_and_mend_a_bad_start() -> None:
    for seed in range(8):
        own = RidgeProblem.of(*problem(seed), 1e-4)
        blocks = np.arange(12).reshape(6, 2)
        start = (0, 1, 2)
        end = improve(own, blocks, start)
        assert len(end) == 3
        assert own.loss(blocks[list(end)].reshape(-1)) <= own.loss(blocks[list(start)].reshape(-1)) * (1 + 1e-9)


def test_spread_and_share() -> None:
    regression, _ = problem(4, tokens=5000)
    best = np.linalg.solve(regression.gram, regression.cross)
    constant = np.zeros_like(best)
    constant[-1] = regression.cross[-1] / regression.tokens
    np.testing.assert_allclose(regression.loss(constant), regression.spread, rtol=1e-9)
    assert 0.0 < regression.loss_share(best) < regression.loss_share(constant)
    few, _ = problem(5, tokens=10)
    assert few.loss_share(np.zeros((13, 3))) == float("inf")
