"""Exact unconditional score test for paired right/wrong outcomes (non-inferiority).

Per item D is 1 if only the original is right (a items), -1 if only the new model is (b items), else 0. The
null hypothesis is E D >= epsilon. The statistic is the score with the nuisance q = P(only the new one is right)
restricted to the boundary (Tango 1998; Nam 1997); its size is made exact by taking the worst q, trinomial by trinomial.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Values = NDArray[np.float64]
NEGLIGIBLE = 1e-13
NUISANCE_POINTS = 240


def restricted_estimate(a: Values | float, b: Values | float, n: int, epsilon: float) -> Values:
    """Maximum-likelihood q given E D = epsilon: the larger root of 2n q^2 + (..) q - b epsilon (1 - epsilon) = 0."""
    linear = -a - b + (2 * n - a + b) * epsilon
    constant = -b * epsilon * (1.0 - epsilon)
    root = (-linear + np.sqrt(np.maximum(linear**2 - 8.0 * n * constant, 0.0))) / (4.0 * n)
    return np.asarray(np.clip(root, 0.0, (1.0 - abs(epsilon)) / 2.0 + max(0.0, -epsilon)))


def statistic(a: Values | float, b: Values | float, n: int, epsilon: float) -> Values:
    """z = (n epsilon - (a - b)) / sqrt(n (2q + epsilon - epsilon^2)), large where the new model is good."""
    q = restricted_estimate(a, b, n, epsilon)
    variance = np.maximum(n * (2.0 * q + epsilon - epsilon**2), 1e-300)
    return np.asarray((n * epsilon - (a - b)) / np.sqrt(variance))


def p_value(a: int, b: int, n: int, epsilon: float) -> float:
    """Largest probability, over models that lose epsilon, of a statistic at least as good as the one seen."""
    seen = float(statistic(a, b, n, epsilon))
    return _worst_tail(seen, n, epsilon)


@lru_cache(maxsize=64)
def critical_value(n: int, epsilon: float, delta: float) -> float:
    """Smallest c with P(z >= c) <= delta for every model that loses epsilon."""
    low, high = 0.0, 6.0
    while high - low > 1e-4:
        middle = (low + high) / 2.0
        low, high = (low, middle) if _worst_tail(middle, n, epsilon) <= delta else (middle, high)
    return high


def power(n: int, flips: float, drop: float, epsilon: float, delta: float) -> float:
    """Probability of certifying a model that changes a share `flips` of outcomes and loses `drop`."""
    q = (flips - drop) / 2.0
    if q < 0.0 or q + drop < 0.0:
        raise ValueError("a model cannot lose more than it flips")
    return float(_tail(_most_losses(critical_value(n, epsilon, delta), n, epsilon), n, q, q + drop))


def interval(a: int, b: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of E D (Tango 1998), asymptotic, for reporting."""
    quantile = float(stats.norm.ppf(0.5 + confidence / 2.0))

    def excess(delta: float, sign: float) -> float:
        return float(statistic(a, b, n, delta)) - sign * quantile

    centre, edge = (a - b) / n, 1.0 - 1e-9
    low = -1.0 if excess(-edge, -1.0) > 0 else optimize.brentq(excess, -edge, centre, args=(-1.0,))
    high = 1.0 if excess(edge, 1.0) < 0 else optimize.brentq(excess, centre, edge, args=(1.0,))
    return float(low), float(high)


def items_needed(flips: float, drop: float, epsilon: float, delta: float, wanted: float = 0.8) -> int:
    """Items for this power, by the normal approximation: 6.2 flips / (epsilon - drop)^2 at delta 0.05 and 80 %."""
    if drop >= epsilon:
        return 0
    factor = (stats.norm.ppf(1.0 - delta) + stats.norm.ppf(wanted)) ** 2
    # Without a flip the restricted variance under the null is about epsilon: some items are needed all the same.
    return int(np.ceil(factor * max(flips, epsilon) / (epsilon - drop) ** 2))


def _worst_tail(c: float, n: int, epsilon: float) -> float:
    limits = _most_losses(c, n, epsilon)
    top = (1.0 - epsilon) / 2.0

    def tail(q: float) -> float:
        return _tail(limits, n, q, q + epsilon)

    grid = top * np.linspace(0.0, 1.0, NUISANCE_POINTS) ** 3
    tails = [tail(float(q)) for q in grid]
    worst = int(np.argmax(tails))
    around = (float(grid[max(worst - 1, 0)]), float(grid[min(worst + 1, len(grid) - 1)]))
    found = optimize.minimize_scalar(lambda q: -tail(float(q)), bounds=around, method="bounded")
    return float(max(tails[worst], -found.fun))


def _most_losses(c: float, n: int, epsilon: float) -> NDArray[np.int64]:
    """For each b from 0 to n, the largest a with z(a, b) >= c, or -1. z falls as a grows."""
    b = np.arange(n + 1, dtype=np.float64)
    low, high = np.full(n + 1, -1.0), n - b
    while np.any(high > low):
        middle = np.ceil((low + high) / 2.0)
        good = statistic(middle, b, n, epsilon) >= c - 1e-9
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1.0)
    return low.astype(np.int64)


def _tail(limits: NDArray[np.int64], n: int, q: float, p: float) -> float:
    """P(a <= limits[b]) with b ~ Binomial(n, q) and a given b ~ Binomial(n - b, p / (1 - q))."""
    spread = 9.0 * np.sqrt(n * q * (1.0 - q)) + 30.0
    b = np.arange(max(0, int(n * q - spread)), min(n, int(n * q + spread)) + 1)
    weight = stats.binom.pmf(b, n, q)
    kept = (weight > NEGLIGIBLE) & (limits[b] >= 0)
    b, weight = b[kept], weight[kept]
    given = special.bdtr(np.minimum(limits[b], n - b).astype(np.float64), n - b, min(p / (1.0 - q), 1.0))
    return float(np.sum(weight * np.where(limits[b] >= n - b, 1.0, given)))
