"""Rotary position embedding (Su et al. 2021) between a view of the projection and the operand, found by its values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from rewriter.attention.operands import Operand, slots
from rewriter.attention.trace import Trace, close, inputs_of, outputs_of
from rewriter.core.site import Array, Rotary


@dataclass(frozen=True)
class Turned:
    """What turns a (batch, heads, tokens, dim) value into the operand: maybe a rotation, then factor, then heads."""

    rotary: Rotary | None
    factor: float
    head_of: tuple[int, ...]


def rotate(u: Array, interleaved: bool) -> Array:
    """The quarter turn of pairs: (-u2, u1), pairs either adjacent (`interleaved`) or half the size apart."""
    if interleaved:
        return np.stack([-u[..., 1::2], u[..., 0::2]], -1).reshape(u.shape)
    half = u.shape[-1] // 2
    return np.concatenate([-u[..., half:], u[..., :half]], -1)


def heads_read(plain_BGTD: Array, got_BHTD: Array, tolerance: float = 1e-8) -> tuple[float, tuple[int, ...]] | None:
    """(factor, head_of) with ``got[:, h] = factor * plain[:, head_of[h]]``; None if there are none."""
    if plain_BGTD.shape[0] != got_BHTD.shape[0] or plain_BGTD.shape[2:] != got_BHTD.shape[2:]:
        return None
    plain, got = (np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in (plain_BGTD, got_BHTD))
    energy = (plain * plain).sum(1)
    factors = (got @ plain.T) / np.maximum(energy, 1e-300)
    best = np.argmax(np.abs(factors) * np.sqrt(energy), axis=1)
    chosen = factors[np.arange(len(got)), best]
    factor = float(chosen[0])
    if factor == 0.0 or not close(got, factor * plain[best], tolerance):
        return None
    return factor, tuple(int(g) for g in best)


def find_turn(trace: Trace, source: str, operand: Operand, batch: int) -> Turned | None:
    """What turns a (batch, heads, tokens, dim) value into the operand: heads repeated, maybe rotated before."""
    u = np.random.default_rng(1).standard_normal(trace.shape(source))
    results = trace.probe(source, operand.name, [u, np.zeros_like(u)])
    if results is None or np.abs(results[1]).max() > 0:
        return None
    got = slots(operand, results[0], batch)
    found = heads_read(u, got)
    if found:
        return Turned(None, *found)
    names = _tables(trace, source, operand.name)
    for (cos, sin), interleaved, sign in product(permutations(names, 2), (False, True), (1, -1)):
        turned = _turn(u, trace.value(cos), trace.value(sin), interleaved, sign)
        found = None if turned is None else heads_read(turned, got)
        if found:
            size = trace.shape(cos)[-1]
            return Turned(Rotary(cos, sin, size, interleaved, sign), *found)
    return None


def _tables(trace: Trace, source: str, target: str) -> list[str]:
    path = trace.between(source, target) or []
    inside = {source}.union(*(outputs_of(node) for node in path))
    names = [
        name
        for node in path
        if node.op_type == "Mul"
        for name in inputs_of(node)
        if name not in inside and len(trace.shape(name)) >= 2 and trace.value(name).size > 1
    ]
    return list(dict.fromkeys(names))[:6]


def _turn(u: Array, cos: Array, sin: Array, interleaved: bool, sign: int) -> Array | None:
    size = cos.shape[-1]
    if cos.shape != sin.shape or size > u.shape[-1] or size % 2:
        return None
    head = u[..., :size]
    try:
        np.broadcast_shapes(head.shape, cos.shape)
    except ValueError:
        return None
    turned = head * cos + sign * rotate(head, interleaved) * sin
    return np.concatenate([turned, u[..., size:]], -1) if turned.shape == head.shape else None
