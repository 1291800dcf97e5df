"""Which element-wise function a path of nodes computes, by its values on a grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import erf, expit

from rewriter.attention.trace import Trace, close
from rewriter.core.site import Array

KNOWN: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x / np.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
}
# models store the constants of these functions as float32, and some write them with seven digits
CONSTANT_TOLERANCE = 1e-6


def elementwise(trace: Trace, source: str, target: str) -> Array | None:
    """The values a path gives on a grid over [-8, 8], laid out like source; None if it treats elements differently.

    Whether it is one function of each element alone is tested by shuffling the elements.
    """
    shape = trace.shape(source)
    if trace.shape(target) != shape:
        return None
    grid = grid_like(shape)
    order = np.random.default_rng(0).permutation(grid.size)
    results = trace.probe(source, target, [grid, grid.reshape(-1)[order].reshape(shape)])
    if results is None or not np.isfinite(results[0]).all():
        return None
    shuffled = results[0].reshape(-1)[order].reshape(shape)
    return results[0] if close(results[1], shuffled, 1e-12) else None


def grid_like(shape: tuple[int, ...]) -> Array:
    """A grid over [-8, 8] with the given shape."""
    return np.linspace(-8.0, 8.0, int(np.prod(shape))).reshape(shape)


def name_of(values: Array) -> str:
    """The known function that has these values on `grid_like`, or ``path``."""
    grid = grid_like(values.shape)
    for name, function in KNOWN.items():
        if close(values, function(grid), CONSTANT_TOLERANCE):
            return name
    return "path"


def holds(trace: Trace, name: str, source: str, target: str) -> bool:
    """Whether a path is the function of that name, up to its constants, far from zero too: a clipped one is not."""
    near = grid_like(trace.shape(source))
    far = np.sign(near) * 10.0 ** (5 * np.abs(near) / 8)
    results = trace.probe(source, target, [near, far])
    if results is None or name not in KNOWN:
        return False
    for x, found in zip((near, far), results, strict=True):
        expected = KNOWN[name](x)
        within = np.abs(found - expected) <= CONSTANT_TOLERANCE * np.maximum(8.0, np.abs(expected))
        if found.shape != expected.shape or not within.all():
            return False
    return True
