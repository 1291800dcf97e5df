"""What may be claimed of a drop: certified at a confidence, or not, and how many samples it would take.

The guarantee is for the distribution that the samples were drawn from, and for items that are independent: samples of
one document count as one item.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy import betting, score_test
from rewriter.accuracy.paired import Paired
from rewriter.core.errors import OptionError
from rewriter.core.options import MaxDrop

BOOTSTRAP_DRAWS = 2000
SMALLEST_POWER = 0.05


@dataclass(frozen=True)
class Verdict:
    """A finding about one metric. `baseline`, `best` and the drops are on the metric's own scale.

    `drop_low` and `drop_high` are a two-sided interval for reporting; `bound` is the largest drop that the test leaves
    possible at `confidence`, None where it was not computed. `n` counts items, `samples` what was scored.
    """

    metric: str
    unit: str
    baseline: float
    best: float
    drop: float
    drop_low: float
    drop_high: float
    max_drop: str
    certified: bool
    confidence: float
    n: int
    samples: int
    method: str
    reason: str
    bound: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass(frozen=True)
class Forecast:
    """What certification would need, said before its split is opened. `needed` is None if no n would do."""

    power: float
    needed: int | None
    n: int
    sentence: str

    @property
    def worth_opening(self) -> bool:
        """Whether there is any real chance to certify."""
        return self.power >= SMALLEST_POWER


@dataclass(frozen=True)
class Test:
    """The losses to be tested, and against what: E D >= epsilon, for losses in [low, high]."""

    losses: NDArray[np.float64]
    epsilon: float
    low: float
    high: float
    binary: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        """Items only the original gets right, items only the new model gets right, all items."""
        return int((self.losses > 0.5).sum()), int((self.losses < -0.5).sum()), len(self.losses)


def certify(
    paired: Paired, max_drop: MaxDrop, confidence: float = 0.95, group: NDArray[np.int64] | None = None
) -> Verdict:
    """Test whether the new model loses less than `max_drop`, without assumptions on how losses are distributed.

    0/1 outcomes get the exact score test, other losses the betting bound; so does a relative drop, written as the
    bounded loss ``(1 - share) * original - new``. A `confidence` of zero (a used-up ledger) certifies nothing.
    """
    items = paired.by_group(group)
    test = _test_of(items, max_drop)
    delta = 1.0 - confidence
    certified, method, bound = (False, "none", None) if confidence <= 0.0 else _decide(test, delta)
    low, high = interval(items)
    return Verdict(
        metric=paired.metric,
        unit=paired.unit,
        baseline=items.baseline,
        best=items.best,
        drop=items.drop,
        drop_low=low,
        drop_high=high,
        max_drop=str(max_drop),
        certified=certified,
        confidence=confidence,
        n=len(items),
        samples=len(paired),
        method=method,
        reason=_reason(items, test, max_drop, confidence, certified),
        bound=bound if not max_drop.relative else None,
    )


def foresee(
    paired: Paired,
    n: int,
    max_drop: MaxDrop,
    confidence: float = 0.95,
    group: NDArray[np.int64] | None = None,
) -> Forecast:
    """The chance to certify with n items that behave like these of the selection split, and the n it would take."""
    test = _test_of(paired.by_group(group), max_drop)
    delta = 1.0 - confidence
    if confidence <= 0.0 or float(test.losses.mean()) >= test.epsilon:
        why = "the confidence is used up" if confidence <= 0.0 else f"the drop on the selection data is over {max_drop}"
        return Forecast(0.0, None, n, f"not certifiable: {why}")
    needed = _needed(test, delta)
    power = _power(test, n, delta)
    if power < 0.5:
        return Forecast(power, needed, n, f"not certifiable at this n ({n:,}): about {needed:,} samples needed")
    return Forecast(power, needed, n, f"{n} samples certify {max_drop} with probability {power:.0%} if nothing changes")


def interval(paired: Paired, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Two-sided interval of the drop: score interval for 0/1 outcomes, bootstrap over items for others."""
    losses = paired.losses
    if paired.binary:
        a, b = int((losses > 0.5).sum()), int((losses < -0.5).sum())
        return score_test.interval(a, b, len(losses), confidence)
    rng = np.random.default_rng(seed)
    chunks = [losses[rng.integers(0, len(losses), (100, len(losses)))].mean(1) for _ in range(BOOTSTRAP_DRAWS // 100)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(chunks), [tail, 1.0 - tail])
    return float(low), float(high)


def _test_of(items: Paired, max_drop: MaxDrop) -> Test:
    low, high = items.loss_range
    # Data comes sorted by source; betting may stop early, which is sound only if every prefix is a fair sample.
    order = np.random.default_rng(0).permutation(len(items))
    if not max_drop.relative:
        return Test(items.losses[order], max_drop.fraction, low, high, items.binary)
    if not items.higher_is_better or items.low != 0.0:
        raise OptionError(
            f"a relative --max-drop means nothing for {items.metric}, whose best value is zero",
            f"Write --max-drop {max_drop.fraction * 100:g}%",
        )
    kept = 1.0 - max_drop.fraction
    low = -items.high * max_drop.fraction if items.ideal_original else -items.high
    return Test((kept * items.original - items.new)[order], 0.0, low, kept * items.high, False)


def _decide(test: Test, delta: float) -> tuple[bool, str, float | None]:
    if test.binary:
        certified = score_test.p_value(*test.counts, test.epsilon) <= delta
        return certified, "exact unconditional score test", None
    certified = betting.rejects(test.losses, test.epsilon, test.low, test.high, delta)
    return certified, "betting bound", betting.upper_bound(test.losses, test.low, test.high, delta)


def _power(test: Test, n: int, delta: float) -> float:
    if not test.binary:
        return betting.power(test.losses, n, test.epsilon, test.low, test.high, delta)
    a, b, seen = test.counts
    return score_test.power(n, (a + b) / seen, (a - b) / seen, test.epsilon, delta)


def _needed(test: Test, delta: float) -> int:
    if not test.binary:
        return betting.items_needed(test.losses, test.epsilon, test.low, test.high, delta)
    a, b, seen = test.counts
    return score_test.items_needed((a + b) / seen, (a - b) / seen, test.epsilon, delta)


def _reason(items: Paired, test: Test, max_drop: MaxDrop, confidence: float, certified: bool) -> str:
    n, claim = len(items), f"{items.metric} drop <= {_limit(items.unit, max_drop)}"
    if confidence <= 0.0:
        return "not certified: the certification data was used too often"
    if certified:
        return f"{claim} with {100.0 * confidence:.4g} % confidence, n = {n:,}"
    if float(test.losses.mean()) >= test.epsilon:
        return f"not certified: the measured drop of {items.metric}, {items.drop:.4f}, is over the limit (n = {n:,})"
    return f"not certifiable at this n ({n:,}): about {_needed(test, 1.0 - confidence):,} samples needed for {claim}"


def _limit(unit: str, max_drop: MaxDrop) -> str:
    if max_drop.relative:
        return f"{100.0 * max_drop.fraction:g} % of the original's"
    return f"{max_drop.fraction:g} nats" if unit == "nats" else f"{100.0 * max_drop.fraction:g} points"
