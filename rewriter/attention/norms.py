"""The norm of a query or key head (Henry et al. 2020), recognised by what it does to two inputs of different size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewriter.attention.trace import Trace, close
from rewriter.core.site import Array, HeadNorm


def normalise(u: Array, norm: HeadNorm) -> Array:
    """The norm itself, over the last axis."""
    if norm.kind == "layer":
        u = u - u.mean(-1, keepdims=True)
    u = u / np.sqrt((u * u).mean(-1, keepdims=True) + norm.epsilon) * norm.gain_D
    return u if norm.bias_D is None else u + norm.bias_D


def find_norm(trace: Trace, source: str, target: str, heads_axis: int | None = None) -> HeadNorm | None:
    """The norm over the last axis that takes source to target; None if it is none.

    With `heads_axis`, the heads along that axis of four may have gains of their own.
    """
    shape = trace.shape(source)
    if trace.shape(target) != shape or not trace.floating(target):
        return None
    u = np.random.default_rng(3).standard_normal(shape)
    # far apart in size: at 1e4 epsilon cannot be seen, at 1e-3 it decides
    results = trace.probe(source, target, [0 * u, 1e4 * u, 1e-3 * u])
    if results is None or not all(np.isfinite(r).all() for r in results):
        return None
    found = _fitted(u, results, tuple(range(len(shape) - 1)))
    if found is not None or heads_axis is None or len(shape) != 4:
        return found
    found = _fitted(u, results, tuple(axis for axis in range(3) if axis != heads_axis))
    if found is None:
        return None
    lines = shape[heads_axis], shape[-1]
    bias_D = None if found.bias_D is None else found.bias_D.reshape(lines)
    return replace(found, gain_D=found.gain_D.reshape(lines), bias_D=bias_D)


def _fitted(u: Array, results: Sequence[Array], rows: tuple[int, ...]) -> HeadNorm | None:
    """The norm with one gain along these axes, from what it makes of u times 0, 1e4 and 1e-3."""
    zero, large, small = results
    last = rows == tuple(range(u.ndim - 1))
    bias = zero.reshape(-1, u.shape[-1])[0] if last else zero[:1].take([0], rows[-1])
    for kind in ("rms", "layer"):
        centred = u - u.mean(-1, keepdims=True) if kind == "layer" else u
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True))
        gain = ((large - bias) * unit).sum(rows, keepdims=not last) / (unit * unit).sum(rows, keepdims=not last)
        epsilon = _epsilon(1e-3 * centred, (small - bias), gain)
        norm = HeadNorm("layer" if kind == "layer" else "rms", gain, bias if np.abs(bias).max() > 0 else None, epsilon)
        if close(normalise(1e4 * u, norm), large, 1e-8) and close(normalise(1e-3 * u, norm), small, 1e-6):
            return norm
    return None


def _epsilon(centred: Array, moved: Array, gain: Array) -> float:
    energy = (moved**2).sum(-1)
    if not energy.all():
        return 0.0
    values = ((centred * gain) ** 2).sum(-1) / energy - (centred**2).mean(-1)
    # models store epsilon as float32; what is below 1e-13 is rounding
    epsilon = float(np.float32(np.median(values)))
    return epsilon if epsilon > 1e-13 else 0.0
