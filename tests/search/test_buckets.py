"""Sizes are chosen by expected seconds: exactly, as exhaustive search says, and as few as are worth it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rewriter.core.lengths import Requests
from rewriter.search.buckets import Curve, candidates, choose, expected_s, probes, serving


def quadratic(requests: Requests) -> Curve:
    return Curve({(b, t): b * (1e-3 + 2e-5 * t + 1e-6 * t * t) for b, t in candidates(requests)})


def drawn(seed: int, batches: tuple[int, ...] = (1,)) -> Requests:
    rng = np.random.default_rng(seed)
    sizes = zip(rng.choice(batches, 30), rng.integers(1, 64, 30), strict=True)
    return Requests({(int(b), int(t)): int(rng.integers(1, 9)) for b, t in sizes}, "drawn")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_lengths_are_faster(seed: int, count: int) -> None:
    requests = drawn(seed)
    curve = quadratic(requests)
    found = choose(requests, curve, count)
    assert len(found.sizes) == count and found.sizes[-1] == (1, requests.longest)
    assert found.expected_s == pytest.approx(expected_s(requests, found.sizes, curve))
    others = itertools.combinations(candidates(requests)[:-1], count - 1)
    best = min(expected_s(requests, (*some, (1, requests.longest)), curve) for some in others)
    assert found.expected_s == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_batches_are_layers(seed: int) -> None:
    requests = drawn(seed, (1, 4))
    curve = quadratic(requests)
    found = choose(requests, curve, 3)
    assert expected_s(requests, found.sizes, curve) <= found.expected_s * (1 + 1e-9)
    best = np.inf
    for count in (1, 2, 3):
        for some in itertools.combinations(candidates(requests), count):
            if all(serving(some, request) for request in requests.counts):
                best = min(best, expected_s(requests, some, curve))
    # A request that overflows into a larger batch is not among what is searched: exhaustive search may be a bit better.
    assert best <= found.expected_s * (1 + 1e-9) and found.expected_s <= 1.1 * best


def test_seconds_decide_not_tokens() -> None:
    requests = Requests.of_lengths([8] * 50 + [40] * 50 + [48] * 2, "here")
    # By padded tokens 48 would be best split off at 8; where 8 takes as long as 40 the cut must lie elsewhere.
    curve = Curve({(1, 8): 1.0, (1, 40): 1.0, (1, 48): 4.0})
    assert choose(requests, curve, 2).sizes == ((1, 40), (1, 48))


def test_as_few_as_are_worth_it() -> None:
    flat = Requests.of_lengths(range(1, 65), "here")
    assert choose(flat, Curve({(1, 8): 1.0, (1, 64): 1.001})).sizes == ((1, 64),)
    steep = choose(flat, Curve({(1, 8): 0.1, (1, 64): 10.0}))
    assert 3 <= len(steep.sizes) <= 8
    assert len(choose(flat, Curve({(1, 8): 0.1, (1, 64): 10.0}), most=2).sizes) == 2


def test_one_length_is_one_bucket_however_many_are_asked_for() -> None:
    requests = Requests.of_lengths([17] * 5, "here")
    assert choose(requests, Curve({(1, 17): 1.0}), 4).sizes == ((1, 17),)
    assert candidates(requests) == [(1, 17)] == probes(requests, 3)


def test_room_beyond_what_was_counted_gets_a_size_of_its_own() -> None:
    requests = Requests({(1, 10): 5, (1, 30): 5}, "here", room=64)
    curve = Curve({(1, 8): 1.0, (1, 64): 8.0})
    assert choose(requests, curve, 1).sizes == ((1, 64),)
    assert choose(requests, curve, 2).sizes == ((1, 32), (1, 64))
    assert choose(requests, curve).sizes == ((1, 16), (1, 32), (1, 64))


def test_many_lengths_stay_few_candidates_and_probes_reach_both_ends() -> None:
    requests = Requests.of_lengths(range(1, 4001), "here")
    lengths = [tokens for _, tokens in candidates(requests)]
    assert len(lengths) <= 100 and lengths[-1] == 4000 and all(t % 8 == 0 for t in lengths)
    tried = [tokens for _, tokens in probes(requests, 4)]
    assert tried[0] == lengths[0] and tried[-1] == 4000 and len(tried) == 4


def test_many_batches_stay_few_and_all_are_held() -> None:
    requests = Requests({(batch, 16): 1 + batch % 3 for batch in range(1, 21)}, "here")
    found = choose(requests, quadratic(requests))
    assert max(found.sizes)[0] == 20 and len(found.sizes) <= 6
    assert all(serving(found.sizes, request) for request in requests.counts)


def test_a_curve_is_what_was_measured_and_linear_between() -> None:
    curve = Curve({(1, 10): 1.0, (1, 20): 3.0, (4, 10): 4.0})
    assert (curve((1, 10)), curve((1, 15)), curve((1, 20)), curve((1, 99))) == (1.0, 2.0, 3.0, 3.0)
    assert curve((4, 10)) == 4.0 and curve((2, 10)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="measurement"):
        Curve({})


def test_what_fits_nowhere() -> None:
    requests = Requests.of_lengths([9], "here")
    assert serving([(1, 8)], (1, 9)) is None
    with pytest.raises(ValueError, match="no size holds"):
        expected_s(requests, [(1, 8)], Curve({(1, 8): 1.0}))
