"""The correction loop: predicted damages add up too little, so whole variants are built, scored and fed back.

Replace-one scores under-count the damage of a mix (by about 1.3 on MiniLM), and hand-made uniform mixes have beaten
solved ones: both facts are built in. Everything measured is recorded; a missing or NaN score can never win.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rewriter.core.option import Option, Plan
from rewriter.search.problem import Choice, Options, Problem
from rewriter.search.solvers import solve

UNIFORM = "uniform"
_UNDERCOUNT = 1.3  # starting guess for measured / predicted damage of a mix
_CLOSE = 0.85  # a passing variant that uses this share of the budget is not worth another try
_NARROW = 1.05  # passing and failing budgets this close to each other end the search


@dataclass(frozen=True)
class Trial:
    """One whole variant: what was predicted and what its score on the selection split was."""

    name: str
    plan: Plan
    saved_s: float
    predicted: float
    damage: float

    def passes(self, budget: float) -> bool:
        """Whether the measured damage is within the budget; a score that is missing or NaN never is."""
        return bool(np.isfinite(self.damage)) and self.damage <= budget


def refine(
    problem: Problem,
    damage_of: Callable[[str, Plan], float],
    budget: float,
    rounds: int,
    enough: Callable[[], bool] = lambda: False,
) -> list[Trial]:
    """Trials in the order made. `damage_of(name, plan)` assembles a variant and scores it on the selection split.

    Solves at the budget divided by the current estimate of under-counting, scores, corrects the estimate, and goes on
    between the largest predicted damage that passed and the smallest that failed. The best uniform mix gets one trial.
    `enough()` ends the loop early (time is up).
    """
    trials: list[Trial] = []
    factor, low, high = _UNDERCOUNT, 0.0, float("inf")
    for index in range(rounds):
        allowed = budget / factor
        if high < float("inf"):
            allowed = min(max(allowed, low * 1.02), (low + high) / 2 if low else high * 0.9)
        picked = solve(problem, allowed, [problem.pick(t.plan) for t in trials])
        if picked is None or not problem.plan(picked).options or enough():
            break
        trial = _try(problem, picked, f"solved {index + 1}", damage_of)
        trials.append(trial)
        if np.isfinite(trial.damage) and trial.predicted > 0:
            factor = max(0.3, trial.damage / trial.predicted) * 1.03
        if trial.passes(budget):
            low = max(low, trial.predicted)
        else:
            high = min(high, trial.predicted)
        if (trial.passes(budget) and trial.damage > _CLOSE * budget) or high < _NARROW * low:
            break
    rival = best_uniform(problem, budget / factor)
    if rival is not None and not enough() and all(problem.plan(rival) != t.plan for t in trials):
        trials.append(_try(problem, rival, UNIFORM, damage_of))
    return trials


def _try(problem: Problem, picked: Mapping[str, Choice], name: str, damage_of: Callable[[str, Plan], float]) -> Trial:
    plan = problem.plan(picked)
    return Trial(name, plan, problem.saved_s(picked), problem.damage(picked), damage_of(name, plan))


def best_uniform(problem: Problem, allowed: float) -> dict[str, Choice] | None:
    """The fastest mix that does the same at every attention and the same at every feed-forward, within the budget."""
    kinds: dict[str, list[str]] = {}
    for site in problem.sites:
        kinds.setdefault(site.rpartition(".")[2], []).append(site)
    per_kind = [[(sites, options) for options in _shared(problem, sites)] for sites in kinds.values()]
    best: dict[str, Choice] | None = None
    for combination in itertools.product(*per_kind):
        picked = {
            site: next(c for c in problem.sites[site] if _anywhere(c.options) == options)
            for sites, options in combination
            for site in sites
        }
        if problem.damage(picked) <= allowed and problem.saved_s(picked) > 0:
            ordered = {site: picked[site] for site in problem.sites}
            if best is None or problem.saved_s(ordered) > problem.saved_s(best):
                best = ordered
    return best


def _shared(problem: Problem, sites: list[str]) -> list[Options]:
    """Options (without their site) that every one of these sites has among its choices."""
    common = [{_anywhere(choice.options) for choice in problem.sites[site]} for site in sites]
    return sorted(set.intersection(*common), key=str)


def _anywhere(options: Options) -> Options:
    return tuple(Option(option.name, option.parameters) for option in options)
