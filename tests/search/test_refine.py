from __future__ import annotations

import math

import pytest

from rewriter.core.option import Option, Plan
from rewriter.search.problem import Choice, Problem
from rewriter.search.refine import best_uniform, refine
from rewriter.search.sensitivity import build_problem, representative, slopes


def ladder(site: str, scale: float) -> tuple[Choice, ...]:
    cuts = [(Option.of("ffn_pruning", site, width=w),) for w in (7, 6, 5, 4, 3, 2)]
    levels = [Choice(site, cut, 1.0 - 0.1 * (i + 1), scale * (i + 1) ** 2) for i, cut in enumerate(cuts)]
    return (Choice(site, (), 1.0, 0.0), *levels)


def problem() -> Problem:
    scales = (0.5, 1.0, 2.0)
    return Problem({f"layers.{i}.feed_forward": ladder(f"layers.{i}.feed_forward", s) for i, s in enumerate(scales)})


@pytest.mark.parametrize("undercount", [0.7, 1.0, 1.4, 2.5])
def test_finds_a_variant_that_uses_most_of_the_budget(undercount: float) -> None:
    space = problem()
    trials = refine(space, lambda _, plan: undercount * space.damage(space.pick(plan)), budget=30.0, rounds=6)
    passing = [t for t in trials if t.passes(30.0)]
    assert passing
    assert max(t.damage for t in passing) > 0.5 * 30.0
    assert len({t.plan for t in trials}) == len(trials)


def test_a_score_that_is_nan_never_passes() -> None:
    trials = refine(problem(), lambda _, plan: math.nan, budget=30.0, rounds=3)
    assert trials
    assert not any(t.passes(30.0) for t in trials)


def test_stops_when_time_is_up() -> None:
    assert refine(problem(), lambda _, plan: 0.0, budget=30.0, rounds=3, enough=lambda: True) == []


def test_the_uniform_rival_is_uniform_and_within_the_budget() -> None:
    space = problem()
    rival = best_uniform(space, 20.0)
    assert rival is not None
    assert len({choice.options[0].parameters for choice in rival.values()}) == 1
    assert space.damage(rival) <= 20.0


def test_the_representative_is_in_the_middle() -> None:
    site = "layers.0.feed_forward"
    errors = {(): 0.0, **{(Option.of("ffn_pruning", site, width=w),): 10.0**-w for w in (1, 3, 5)}}
    assert representative(errors) == (Option.of("ffn_pruning", site, width=3),)
    assert representative({(): 0.0}) is None


def test_slopes_and_the_problem_they_make() -> None:
    site = "layers.0.feed_forward"
    cut, bad = ((Option.of("ffn_pruning", site, width=w),) for w in (3, 1))
    errors = {site: {(): 0.0, cut: 0.02, bad: math.nan}}
    slope = slopes(errors, lambda plan: 0.004 if plan == Plan({site: cut}) else math.nan)
    assert slope == {site: pytest.approx(0.2)}
    built = build_problem({site: {(): 1.0, cut: 0.5, bad: 0.1}}, errors, slope)
    assert [c.options for c in built.sites[site]] == [(), cut]
    assert built.sites[site][1].damage == pytest.approx(0.004)
