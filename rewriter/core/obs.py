"""Optimal brain surgeon on blocks of columns: which features a re-solved linear map misses least.

Minimises ``||[F|1] W - T||^2 + lambda ||W - W_current||^2`` over W with whole blocks of rows zero. Sources: Hassibi and
Stork 1993 (OBS); Meng et al. 2024 (OSSCAR: local search); Frantar and Alistarh 2022 (one sweep prices all levels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewriter.core.linalg import penalised, ridge_level, solve_gram
from rewriter.core.statistics import Array64, Regression

Index = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class RidgeProblem:
    """The quadratic ``tr(W' H W) - 2 tr(W' right) + constant`` in W (F+1, C), ones-column last and never removed."""

    hessian: Array64
    right: Array64
    constant: float

    @classmethod
    def of(cls, regression: Regression, current: Array64, ridge: float) -> RidgeProblem:
        """From statistics and the current weights (F+1, C), with the relative ridge of `linalg.ridge_towards`."""
        level = ridge_level(regression.gram, ridge)
        pull = level * current
        pull[-1] = 0.0
        return cls(
            penalised(regression.gram, level),
            regression.cross + pull,
            regression.energy + float(np.sum(pull * current)),
        )

    def solve(self, columns: Index) -> Array64:
        """The best weights (K+1, C) that use only these columns, by a fresh factorisation."""
        kept = np.append(columns, self.hessian.shape[0] - 1)
        return solve_gram(self.hessian[np.ix_(kept, kept)], self.right[kept])

    def loss(self, columns: Index) -> float:
        """The objective at `solve(columns)`."""
        kept = np.append(columns, self.hessian.shape[0] - 1)
        return self.constant - float(np.sum(self.right[kept] * self.solve(columns)))


class Elimination:
    """Removes blocks of columns one step at a time; the sum of what `remove` returns is exactly the loss gained.

    `blocks` is (number of blocks, columns per block). Down-dates serve the order only: take weights of a wanted level
    from `RidgeProblem.solve`.
    """

    def __init__(self, problem: RidgeProblem, blocks: Index) -> None:
        columns = np.append(blocks.reshape(-1), problem.hessian.shape[0] - 1)
        self.alive: Index = np.arange(len(blocks))
        self._width = int(blocks.shape[1])
        inverse = np.linalg.inv(problem.hessian[np.ix_(columns, columns)])
        self._inverse = (inverse + inverse.T) / 2.0
        self._weight = self._inverse @ problem.right[columns]

    def scores(self) -> Array64:
        """What removing each of `alive` alone would add to the loss."""
        count, width = len(self.alive), self._width
        weight = self._weight[: count * width].reshape(count, width, -1)
        if width == 1:
            return np.einsum("jbc,jbc->j", weight, weight) / np.diagonal(self._inverse)[:count]
        rows = np.arange(count * width).reshape(count, width)
        own = self._inverse[rows[:, :, None], rows[:, None, :]]
        return np.einsum("jbc,jbc->j", weight, np.linalg.solve(own, weight))

    def remove(self, blocks: Index) -> float:
        """Remove blocks (ids as in `alive`) together; returns the loss this adds."""
        gone = np.flatnonzero(np.isin(self.alive, blocks))
        rows = (gone[:, None] * self._width + np.arange(self._width)).reshape(-1)
        left = np.setdiff1d(np.arange(self._inverse.shape[0]), rows)
        weight = self._weight[rows]
        shares = np.linalg.solve(
            self._inverse[np.ix_(rows, rows)], np.concatenate([weight, self._inverse[np.ix_(rows, left)]], axis=1)
        )
        across = self._inverse[np.ix_(left, rows)]
        outputs = weight.shape[1]
        self._weight = self._weight[left] - across @ shares[:, :outputs]
        self._inverse = self._inverse[np.ix_(left, left)] - across @ shares[:, outputs:]
        self.alive = np.delete(self.alive, gone)
        return float(np.sum(weight * shares[:, :outputs]))


def improve(problem: RidgeProblem, blocks: Index, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Local search by swaps (OSSCAR): add the removed block that helps most, drop the cheapest, while that pays."""
    current = tuple(sorted(kept))
    for _ in range(2 * len(blocks)):
        gone = [block for block in range(len(blocks)) if block not in current]
        if not gone or not current:
            return current
        added = gone[int(np.argmax(_gains(problem, blocks, current, gone)))]
        wider = sorted((*current, added))
        scores = _kept_scores(problem, blocks, wider)
        dropped = wider[int(np.argmin(scores))]
        gain = scores[wider.index(added)] - float(np.min(scores))
        if dropped == added or gain <= 1e-10 * abs(problem.constant):
            return current
        current = tuple(block for block in wider if block != dropped)
    return current


def improve_columns(problem: RidgeProblem, kept: Index, rounds: int = 3, share: float = 0.1) -> Index:
    """Local search by swaps of single columns, many at once while that pays: for problems of thousands of columns.

    Each round exchanges those that help most for those missed least by independent scores, and halves how many until
    the exact loss falls. `share` of the columns bounds the first exchange.
    """
    current, loss = np.sort(kept), problem.loss(kept)
    most = max(1, int(share * len(kept)))
    for _ in range(rounds):
        found = _exchange(problem, current, loss, most)
        if found is None:
            return current
        current, loss, most = found
    return current


def _exchange(problem: RidgeProblem, kept: Index, loss: float, most: int) -> tuple[Index, float, int] | None:
    """A better set of as many columns, its loss and how many were exchanged; None if none was found."""
    gone = np.setdiff1d(np.arange(problem.hessian.shape[0] - 1), kept)
    if not len(gone):
        return None
    inside = np.append(kept, problem.hessian.shape[0] - 1)
    inverse = np.linalg.inv(problem.hessian[np.ix_(inside, inside)])
    weight, across = inverse @ problem.right[inside], problem.hessian[np.ix_(inside, gone)]
    room = np.diagonal(problem.hessian)[gone] - np.einsum("ij,ij->j", across, inverse @ across)
    residual = problem.right[gone] - across.T @ weight
    gains = np.sum(residual**2, axis=1) / np.maximum(room, 1e-12 * np.diagonal(problem.hessian)[gone])
    scores = np.sum(weight[:-1] ** 2, axis=1) / np.diagonal(inverse)[:-1]
    helping, missed_least = np.argsort(-gains, kind="stable"), np.argsort(scores, kind="stable")
    count = int(np.sum(gains[helping[:most]] > scores[missed_least[: len(helping[:most])]]))
    while count:
        tried = np.sort(np.append(np.delete(kept, missed_least[:count]), gone[helping[:count]]))
        after = problem.loss(tried)
        if after < loss - 1e-10 * abs(problem.constant):
            return tried, after, count
        count //= 2
    return None


def _gains(problem: RidgeProblem, blocks: Index, kept: tuple[int, ...], gone: list[int]) -> list[float]:
    """What adding each removed block back would take off the loss."""
    inside = np.append(blocks[list(kept)].reshape(-1), problem.hessian.shape[0] - 1)
    outside = blocks[gone].reshape(-1)
    across = problem.hessian[np.ix_(inside, outside)]
    solved = solve_gram(
        problem.hessian[np.ix_(inside, inside)], np.concatenate([across, problem.right[inside]], axis=1)
    )
    residual = problem.right[outside] - across.T @ solved[:, outside.size :]
    width = blocks.shape[1]
    gains = []
    for position, block in enumerate(gone):
        rows = slice(position * width, (position + 1) * width)
        own = problem.hessian[np.ix_(blocks[block], blocks[block])] - across[:, rows].T @ solved[:, rows]
        gains.append(float(np.sum(residual[rows] * solve_gram(own, residual[rows]))))
    return gains


def _kept_scores(problem: RidgeProblem, blocks: Index, kept: list[int]) -> Array64:
    """What removing each block of a set would add to the loss."""
    columns = np.append(blocks[kept].reshape(-1), problem.hessian.shape[0] - 1)
    smaller = RidgeProblem(problem.hessian[np.ix_(columns, columns)], problem.right[columns], problem.constant)
    return Elimination(smaller, np.arange(len(kept) * blocks.shape[1]).reshape(len(kept), -1)).scores()
