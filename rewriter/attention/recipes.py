"""How a site's weight was cut from the graph, so that drawn numbers can be exchanged for the model's own, uncopied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rewriter.core.site import Array, AttentionSite, FeedForwardSite, RaisedSite

Ledger = dict[int, tuple[Array, "Recipe"]]


@dataclass(frozen=True)
class Recipe:
    """``factor * matrix[..., order]`` of the (C, N) matrix behind a value: channels `order` along `axis`."""

    value: str
    transposed: bool
    axis: int
    order: Array
    factor: float | Array
    dtype: np.dtype[np.generic]

    def times(self, factor: float | Array) -> Recipe:
        """The weight times a factor."""
        return replace(self, factor=self.factor * factor)

    def make(self, matrix_of: Callable[[str], Array]) -> Array:
        """The weight from the model's own matrix: a view of it where that is possible."""
        matrix = matrix_of(self.value)
        picked = pick(matrix.T if self.transposed else matrix, self.order, self.axis)
        return (
            picked
            if np.ndim(self.factor) == 0 and self.factor == 1.0
            else stored(picked.astype(np.float64) * self.factor, self.dtype)
        )


@dataclass(frozen=True)
class Joined(Recipe):
    """Weights one after the other along `axis`, each by its recipe, or as it is; then times `factor`."""

    parts: tuple[Recipe | Array, ...] = ()

    @classmethod
    def of(cls, parts: tuple[Recipe | Array, ...], axis: int, dtype: np.dtype[np.generic]) -> Joined:
        """The parts as they are."""
        return cls("", False, axis, np.zeros(0), 1.0, dtype, parts)

    def make(self, matrix_of: Callable[[str], Array]) -> Array:
        """All of them from the model's own matrices."""
        made = [part.make(matrix_of) if isinstance(part, Recipe) else part for part in self.parts]
        whole = np.concatenate(made, self.axis)
        plain = np.ndim(self.factor) == 0 and self.factor == 1.0
        return whole if plain else stored(whole.astype(np.float64) * self.factor, self.dtype)


def stored(array: Array, dtype: np.dtype[np.generic]) -> Array:
    """The array in the model's dtype if that loses nothing; else in float64, rounded only when it is written out."""
    small = array.astype(dtype)
    return small if np.array_equal(small.astype(np.float64), array) else np.asarray(array, dtype=np.float64)


def pick(matrix: Array, order: Array, axis: int) -> Array:
    """``take(matrix, order, axis)`` of a two-dimensional array, as a view where the order runs in even steps."""
    steps = _steps(order)
    if steps is None:
        return np.take(matrix, order, axis)
    first = int(order.flat[0])
    start = matrix[first:] if axis == 0 else matrix[:, first:]
    stride = matrix.strides[axis]
    inner = tuple(step * stride for step in steps)
    shape = (*order.shape, matrix.shape[1]) if axis == 0 else (matrix.shape[0], *order.shape)
    strides = (*inner, matrix.strides[1]) if axis == 0 else (matrix.strides[0], *inner)
    return np.lib.stride_tricks.as_strided(start, shape, strides, writeable=False)


def _steps(order: Array) -> tuple[int, ...] | None:
    """The step along every axis if the numbers run evenly along each; None otherwise."""
    if not order.size:
        return None
    origin = (0,) * order.ndim
    steps, expected = [], np.full((1,) * order.ndim, order[origin])
    for axis, size in enumerate(order.shape):
        step = int(order[(*origin[:axis], 1, *origin[axis + 1 :])] - order[origin]) if size > 1 else 1
        shape = [size if a == axis else 1 for a in range(order.ndim)]
        expected = expected + (step * np.arange(size)).reshape(shape)
        steps.append(step)
    return tuple(steps) if np.array_equal(expected, order) else None


def with_own_weights(site: RaisedSite, ledger: Ledger, matrix_of: Callable[[str], Array]) -> RaisedSite:
    """The site with every drawn weight exchanged for the model's own; `matrix_of` gives the matrix behind a value."""

    def exchanged(part: Any) -> Any:
        entry = ledger.get(id(part))
        return entry[1].make(matrix_of) if entry is not None else part

    def inside(part: Any) -> Any:
        names = [f.name for f in fields(part)]
        new = {name: exchanged(getattr(part, name)) for name in names if id(getattr(part, name)) in ledger}
        return replace(part, **new) if new else part

    if isinstance(site, FeedForwardSite):
        whole: FeedForwardSite = inside(site)
        return whole
    assert isinstance(site, AttentionSite)
    parts = {name: inside(getattr(site, name)) for name in ("query", "key", "value")}
    return replace(site, **parts, output=None if site.output is None else inside(site.output))
