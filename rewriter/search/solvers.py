"""Exact solvers of the multiple-choice knapsack: a MILP for use, an exhaustive one as its oracle."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rewriter.search.problem import Choice, Problem

Picked = dict[str, Choice]


def solve(problem: Problem, budget: float, excluded: Sequence[Mapping[str, Choice]] = ()) -> Picked | None:
    """The fastest choices whose damage adds up to at most `budget`, other than those excluded; None if there are none.

    Each exclusion is a no-good cut: not all of its choices may be made together again.
    """
    flat = [choice for choices in problem.sites.values() for choice in choices]
    if not flat:
        return None
    scale = max(1e-12, max(abs(choice.latency_s) for choice in flat))
    constraints = [_one_per_site(problem, len(flat)), _damage(flat, budget)]
    for cut in excluded:
        row = np.array([1.0 if cut.get(choice.site) == choice else 0.0 for choice in flat])
        constraints.append(LinearConstraint(row, -np.inf, len(problem.sites) - 1))
    with _silent():
        result = milp(
            c=np.array([choice.latency_s for choice in flat]) / scale,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    return {choice.site: choice for choice, on in zip(flat, result.x, strict=True) if on > 0.5}


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS now and then prints a line of its own debugging to the process's output, where a report may go."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _one_per_site(problem: Problem, width: int) -> LinearConstraint:
    rows = np.zeros((len(problem.sites), width))
    at = 0
    for row, choices in enumerate(problem.sites.values()):
        rows[row, at : at + len(choices)] = 1.0
        at += len(choices)
    return LinearConstraint(rows, 1.0, 1.0)


def _damage(flat: Sequence[Choice], budget: float) -> LinearConstraint:
    # Scaled to the budget, so that the solver's absolute feasibility tolerance (1e-6) means a share of it.
    unit = max(abs(budget), 1e-12)
    return LinearConstraint(np.array([choice.damage for choice in flat]) / unit, -np.inf, budget / unit)


def solve_exhaustively(problem: Problem, budget: float, excluded: Sequence[Mapping[str, Choice]] = ()) -> Picked | None:
    """The same answer by trying everything; for tests and tiny problems."""
    best: Picked | None = None
    best_s = float("inf")
    for combination in itertools.product(*problem.sites.values()):
        picked = {choice.site: choice for choice in combination}
        if problem.damage(picked) > budget or any(picked == dict(cut) for cut in excluded):
            continue
        total_s = sum(choice.latency_s for choice in combination)
        if total_s < best_s:
            best, best_s = picked, total_s
    return best
