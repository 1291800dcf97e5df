"""Intervals and decisions: what counts as faster, and what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.core.measurement import (
    ENOUGH_BLOCKS,
    Decision,
    Interval,
    Measurement,
    bootstrap_median,
    decide,
    speedup,
)

SECONDS = st.floats(1e-6, 1e3)


def blocks(*medians: float) -> Measurement:
    return Measurement("subject", tuple((median,) for median in medians))


@given(st.lists(SECONDS, min_size=1, max_size=30))
def test_interval_holds_the_median_and_stays_in_range(values: list[float]) -> None:
    interval = bootstrap_median(values, draws=200)
    assert min(values) <= interval.low <= interval.median <= interval.high <= max(values)
    assert interval.median == float(np.median(values))
    assert interval.samples == len(values)


def test_interval_is_deterministic_and_grows_with_confidence() -> None:
    values = list(np.random.default_rng(0).lognormal(size=20))
    assert bootstrap_median(values) == bootstrap_median(values)
    narrow, wide = bootstrap_median(values, 0.5), bootstrap_median(values, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    drawn = [bootstrap_median(rng.lognormal(size=15), draws=300) for _ in range(300)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in drawn])
    assert 0.90 <= covered <= 1.0


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_no_interval_without_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        bootstrap_median(values)


def test_latency_is_the_median_of_block_medians() -> None:
    measured = Measurement("subject", ((1.0, 9.0, 2.0), (4.0,), (3.0, 3.0)))
    assert measured.block_medians_s == (2.0, 4.0, 3.0)
    assert measured.latency_s().median == 3.0


def test_speedup_pairs_blocks_so_that_drift_cancels() -> None:
    drift = np.exp(np.random.default_rng(0).normal(size=20))
    ratio = speedup(blocks(*(drift * 2.0)), blocks(*drift))
    assert ratio.median == pytest.approx(2.0) and ratio.high - ratio.low < 1e-9


def test_groups_widen_the_interval_where_they_differ() -> None:
    rng = np.random.default_rng(0)
    processes = np.repeat(rng.normal(1.0, 0.05, size=4), 5)
    values, groups = list(processes + rng.normal(0.0, 0.001, size=20)), list(np.repeat(range(4), 5))
    apart, together = bootstrap_median(values, groups=groups), bootstrap_median(values)
    assert apart.median == together.median and apart.samples == 20
    assert apart.high - apart.low > 1.3 * (together.high - together.low)
    alike = list(rng.normal(1.0, 0.01, size=20))
    assert bootstrap_median(alike, groups=[0] * 20) == bootstrap_median(alike)


def test_groups_of_different_sizes_are_all_drawn_from() -> None:
    interval = bootstrap_median([1.0, 2.0, 2.0, 2.0, 2.0], groups=[7, 3, 3, 3, 3])
    assert (interval.low, interval.median, interval.high) == (1.0, 2.0, 2.0)


def test_equals_with_lucky_processes_are_seldom_called_different() -> None:
    rng, wrong = np.random.default_rng(2), 0
    starts = tuple(int(start) for start in np.repeat(range(4), 5))
    for _ in range(150):
        one, other = (np.repeat(rng.normal(1.0, 0.01, 4), 5) + rng.normal(0.0, 0.01, 20) for _ in range(2))
        pair = [Measurement("subject", tuple((value,) for value in values), {}, starts) for values in (one, other)]
        wrong += decide(speedup(*pair)) is Decision.FASTER
    assert wrong <= 15


def test_speedup_ignores_blocks_without_a_partner() -> None:
    assert speedup(blocks(4.0, 4.0, 400.0), blocks(2.0, 2.0)).median == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("interval", "margin", "expected"),
    [
        (Interval(1.2, 1.1, 1.3), 0.0, Decision.FASTER),
        (Interval(1.2, 1.1, 1.3), 0.15, Decision.INCONCLUSIVE),
        (Interval(1.0, 0.9, 1.1), 0.0, Decision.INCONCLUSIVE),
        (Interval(1.0, 1.0, 1.0), 0.0, Decision.INCONCLUSIVE),
        (Interval(0.8, 0.7, 0.9), 0.0, Decision.SLOWER),
        (Interval(0.95, 0.9, 1.0), 0.0, Decision.INCONCLUSIVE),
    ],
)
def test_decisions(interval: Interval, margin: float, expected: Decision) -> None:
    assert decide(interval, margin) is expected


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize(("times", "verdict"), [(3.0, Decision.FASTER), (0.3, Decision.SLOWER)])
def test_too_few_blocks_decide_nothing_however_clear_they_look(count: int, times: float, verdict: Decision) -> None:
    ratio = speedup(blocks(*[times] * count), blocks(*[1.0] * count))
    assert decide(ratio) is (verdict if count >= ENOUGH_BLOCKS else Decision.INCONCLUSIVE)


@given(st.lists(SECONDS, min_size=6, max_size=20))
def test_nothing_beats_itself(values: list[float]) -> None:
    assert decide(speedup(blocks(*values), blocks(*values))) is Decision.INCONCLUSIVE


def test_reports_get_three_numbers() -> None:
    assert Interval(2.0, 1.0, 3.0, samples=7).as_dict() == {"median": 2.0, "low": 1.0, "high": 3.0}
