"""The exact score test: its size at the boundary, its power, its interval."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rewriter.accuracy import score_test

DELTA = 0.05


def rejection_probability(n, q, p, epsilon, certified):
    """By enumerating every (a, b): nothing shared with the implementation but the decision."""
    a, b = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    a, b = a[certified], b[certified]
    return float(stats.multinomial.pmf(np.stack([a, b, n - a - b], -1), n, [p, q, 1.0 - p - q]).sum())


def decisions(n, epsilon):
    """Which (a, b) are certified, by the critical value."""
    c = score_test.critical_value(n, epsilon, DELTA)
    a, b = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0), indexing="ij")
    return (score_test.statistic(a, b, n, epsilon) >= c) & (a + b <= n)


@pytest.mark.parametrize(("n", "epsilon"), [(60, 0.05), (150, 0.03), (150, 0.1)])
def test_size_at_the_boundary_is_at_most_delta_for_every_flip_rate(n, epsilon):
    certified = decisions(n, epsilon)
    sizes = [
        rejection_probability(n, q, q + epsilon, epsilon, certified)
        for q in np.linspace(0, (1 - epsilon) / 2 - 1e-9, 41)
    ]
    assert max(sizes) <= DELTA + 1e-4
    assert max(sizes) > 0.6 * DELTA


@pytest.mark.parametrize(("n", "epsilon"), [(60, 0.05), (150, 0.03)])
def test_worse_models_are_certified_more_rarely(n, epsilon):
    certified = decisions(n, epsilon)
    for q, more in itertools.product((0.0, 0.02, 0.1, 0.3), (0.01, 0.05, 0.2)):
        assert rejection_probability(n, q, q + epsilon + more, epsilon, certified) <= DELTA


def test_p_values_and_critical_values_decide_alike():
    n, epsilon = 120, 0.04
    certified = decisions(n, epsilon)
    for a, b in [(0, 0), (1, 0), (0, 3), (5, 5), (2, 1), (9, 3), (20, 30)]:
        assert (score_test.p_value(a, b, n, epsilon) <= DELTA) == bool(certified[a, b])


def test_the_restricted_estimate_maximises_the_likelihood():
    a, b, n, epsilon = 14, 9, 300, 0.02
    grid = np.linspace(1e-6, 0.3, 30001)
    likelihood = b * np.log(grid) + a * np.log(grid + epsilon) + (n - a - b) * np.log(1 - 2 * grid - epsilon)
    assert float(score_test.restricted_estimate(a, b, n, epsilon)) == pytest.approx(grid[likelihood.argmax()], abs=2e-5)


@pytest.mark.parametrize(("n", "expected"), [(408, (0.32, 0.23, 0.15, 0.12)), (872, (0.62, 0.41, 0.25, 0.18))])
def test_power_is_that_of_the_published_table(n, expected):
    """Drop <= 1 point at 95 %: flips 2 %, 4 %, 4 % with a true drop of 0.3 points, 8 % with 0.3 points."""
    cases = [(0.02, 0.0), (0.04, 0.0), (0.04, 0.003), (0.08, 0.003)]
    assert [score_test.power(n, f, d, 0.01, DELTA) for f, d in cases] == pytest.approx(expected, abs=0.006)


def test_items_needed_follow_the_rule_of_thumb_and_suffice():
    needed = score_test.items_needed(0.04, 0.0, 0.01, DELTA)
    assert needed == pytest.approx(6.2 * 0.04 / 0.01**2, rel=0.01)
    assert score_test.power(needed, 0.04, 0.0, 0.01, DELTA) == pytest.approx(0.8, abs=0.03)
    assert score_test.items_needed(0.04, 0.01, 0.01, DELTA) == 0


def test_the_interval_covers_and_is_symmetric():
    low, high = score_test.interval(12, 7, 400)
    assert low < 5 / 400 < high and score_test.interval(7, 12, 400) == pytest.approx((-high, -low), abs=1e-6)
    rng = np.random.default_rng(0)
    truth = 0.02
    drawn = rng.multinomial(300, [0.05, 0.03, 0.92], size=400)
    covered = [low <= truth <= high for low, high in (score_test.interval(int(a), int(b), 300) for a, b, _ in drawn)]
    assert np.mean(covered) > 0.92


def test_nothing_lost_on_few_items_is_not_proof():
    assert score_test.p_value(0, 0, 50, 0.01) > 0.5
    assert score_test.p_value(0, 0, 1000, 0.01) < 0.01
