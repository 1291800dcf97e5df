"""The betting bound: false certificates, power, the upper bound."""

import numpy as np
import pytest

from rewriter.accuracy import betting

DELTA = 0.05


def false_positive_rate(draw, epsilon, low, high, runs):
    rng = np.random.default_rng(7)
    return np.mean([betting.rejects(draw(rng), epsilon, low, high, DELTA) for _ in range(runs)])


@pytest.mark.parametrize(
    ("draw", "low"),
    [
        (lambda rng: rng.choice([1.0, -1.0, 0.0], 400, p=[0.06, 0.01, 0.93]), -1.0),
        (lambda rng: (rng.random(400) < 0.05).astype(float), 0.0),
        (lambda rng: rng.beta(0.5, 9.5, 400), 0.0),
        (lambda rng: np.full(400, 0.05), 0.0),
    ],
    ids=["flips", "rare total losses", "skewed", "constant"],
)
def test_a_model_that_loses_epsilon_is_rarely_certified(draw, low):
    """10,000 simulations in all; the mean loss is exactly the limit."""
    rate = false_positive_rate(draw, 0.05, low, 1.0, 2500)
    assert rate <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / 2500)


def test_looking_after_every_item_is_allowed():
    rng = np.random.default_rng(3)
    ever = [
        betting.log_capital(rng.beta(0.5, 9.5, 300), 0.05, 0.0, 1.0, DELTA).max() >= np.log(1 / DELTA)
        for _ in range(1000)
    ]
    assert np.mean(ever) <= DELTA + 0.02


def test_stakes_depend_on_the_past_alone():
    rng = np.random.default_rng(0)
    losses = rng.beta(1, 9, 200)
    changed = losses.copy()
    changed[120:] = 1.0
    first, second = (betting.log_capital(x, 0.2, 0.0, 1.0, DELTA) for x in (losses, changed))
    assert np.array_equal(first[:120], second[:120]) and not np.allclose(first[120:], second[120:])


def test_small_losses_are_certified_with_enough_items():
    losses = np.random.default_rng(0).gamma(2, 0.002, 3000).clip(0, 1)
    assert not betting.rejects(losses[:300], 0.01, 0.0, 1.0, DELTA)
    assert betting.rejects(losses, 0.01, 0.0, 1.0, DELTA)


def test_the_upper_bound_is_where_certification_begins():
    losses = np.random.default_rng(0).gamma(2, 0.002, 2000).clip(0, 1)
    bound = betting.upper_bound(losses, 0.0, 1.0, DELTA)
    assert losses.mean() < bound < 0.01
    assert betting.rejects(losses, bound + 1e-4, 0.0, 1.0, DELTA)
    assert not betting.rejects(losses, bound - 1e-4, 0.0, 1.0, DELTA)


def test_items_needed_reach_the_wanted_power():
    losses = np.random.default_rng(0).gamma(2, 0.003, 500).clip(0, 1)
    needed = betting.items_needed(losses, 0.01, 0.0, 1.0, DELTA)
    assert betting.power(losses, needed, 0.01, 0.0, 1.0, DELTA) > 0.65
    assert betting.power(losses, needed // 3, 0.01, 0.0, 1.0, DELTA) < 0.5
    assert betting.items_needed(losses, 0.005, 0.0, 1.0, DELTA) == 0


def test_no_item_certifies_nothing():
    assert not betting.rejects(np.array([]), 0.01, 0.0, 1.0, DELTA)
