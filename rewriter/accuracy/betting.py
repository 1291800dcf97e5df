"""A bound on the mean of bounded losses that holds for any distribution and any n, by betting against the null.

Waudby-Smith and Ramdas (2024): under the null the capital of a gambler who bets on small losses is a supermartingale,
so it reaches 1/delta with probability at most delta (Ville), whenever one looks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
# Any share below 1 is valid; against 0.5 this needs a third fewer items when losses hardly vary (measured).
CAP = 0.75
PRIOR_VARIANCE = 0.25


def log_capital(losses: Values, epsilon: float, low: float, high: float, delta: float) -> Values:
    """Log capital after each item, against E D >= epsilon, for losses in [low, high] in the order given.

    On Y = (high - D) / (high - low) with mean at most m under the null it stakes
    lambda_i = min(sqrt(2 ln(1/delta) / (n var_(i-1))), CAP / m), where the variance is of the items before i.
    """
    n = len(losses)
    y = (high - np.asarray(losses, dtype=np.float64)) / (high - low)
    m = (high - epsilon) / (high - low)
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(y)) / (count + 1)
    squares = PRIOR_VARIANCE + np.cumsum((y - mean) ** 2)
    variance = np.concatenate([[PRIOR_VARIANCE], (squares / (count + 1))[:-1]])
    stake = np.minimum(np.sqrt(2.0 * np.log(1.0 / delta) / (n * variance)), CAP / m)
    return np.asarray(np.cumsum(np.log1p(stake * (y - m))))


def rejects(losses: Values, epsilon: float, low: float, high: float, delta: float) -> bool:
    """Whether E D < epsilon is certified at level delta."""
    if not low < epsilon < high or len(losses) == 0:
        return epsilon >= high
    return bool(log_capital(losses, epsilon, low, high, delta).max() >= np.log(1.0 / delta))


def upper_bound(losses: Values, low: float, high: float, delta: float) -> float:
    """Smallest epsilon that is certified (to 1e-5 of the range): an upper confidence bound on E D."""
    good, bad = high, max(low, float(np.mean(losses)))
    while good - bad > 1e-5 * (high - low):
        middle = (good + bad) / 2.0
        good, bad = (middle, bad) if rejects(losses, middle, low, high, delta) else (good, middle)
    return good


def power(
    losses: Values, n: int, epsilon: float, low: float, high: float, delta: float, draws: int = 200, seed: int = 0
) -> float:
    """Probability of certifying with n items like these, by resampling them."""
    rng = np.random.default_rng(seed)
    drawn = (losses[rng.integers(0, len(losses), n)] for _ in range(draws))
    return float(np.mean([rejects(sample, epsilon, low, high, delta) for sample in drawn]))


def items_needed(losses: Values, epsilon: float, low: float, high: float, delta: float, wanted: float = 0.8) -> int:
    """Items like these for this power, found by doubling and then halving; 0 if they do not stay below epsilon."""
    if float(np.mean(losses)) >= epsilon:
        return 0
    few, many = 16, 32
    while power(losses, many, epsilon, low, high, delta, draws=60) < wanted:
        few, many = many, many * 2
        if many > 2**20:
            return many
    while many - few > max(8, few // 10):
        middle = (few + many) // 2
        enough = power(losses, middle, epsilon, low, high, delta, draws=60) >= wanted
        few, many = (few, middle) if enough else (middle, many)
    return many
