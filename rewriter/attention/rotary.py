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


def find_turn(
    trace: Trace, source: str, operand: Operand, batch: int, axes: tuple[int, ...] = (0, 1, 2, 3)
) -> Turned | None:
    """What turns a four-dimensional value into the operand: heads repeated, maybe rotated before.

    `axes` brings the value to (batch, heads, tokens, dim).
    """
    u = np.random.default_rng(1).standard_normal(trace.shape(source))
    results = trace.probe(source, operand.name, [u, np.zeros_like(u)])
    if results is None or np.abs(results[1]).max() > 0:
        return None
    got, u_BGSD = slots(operand, results[0], batch), u.transpose(axes)
    found = heads_read(u_BGSD, got)
    if found:
        return Turned(None, *found)
    for cos, sin in permutations(_tables(trace, source, operand.name), 2):
        turned = _find_rotation(trace, (cos, sin), u_BGSD, got)
        if turned:
            return turned
    return None


def _find_rotation(trace: Trace, names: tuple[str, str], u: Array, got: Array) -> Turned | None:
    cos, sin = (trace.value(name) for name in names)
    if cos.shape != sin.shape:
        return None
    for form, interleaved, sign in product(_forms(cos.ndim), (False, True), (1, -1)):
        turned, size = _turn(u, reform(cos, form, interleaved), reform(sin, form, interleaved), interleaved, sign)
        found = None if turned is None else heads_read(turned, got)
        if found:
            return Turned(Rotary(*names, size, interleaved, sign, form), *found)
    return None


def _forms(rank: int) -> list[tuple[str, ...]]:
    first: list[tuple[str, ...]] = [(), *([("heads",)] if rank == 3 else []), *([("swap",)] if rank == 4 else [])]
    return [(*form, *last) for last in ((), ("double",)) for form in first]


def reform(table: Array, form: tuple[str, ...], interleaved: bool) -> Array:
    """A table after the steps of `Rotary.table_form`."""
    for step in form:
        if step == "heads":
            table = table[:, None]
        elif step == "swap":
            table = table.swapaxes(1, 2)
        else:
            table = np.repeat(table, 2, -1) if interleaved else np.concatenate([table, table], -1)
    return table


def _tables(trace: Trace, source: str, target: str) -> list[str]:
    path = trace.between(source, target) or []
    inside = {source}.union(*(outputs_of(node) for node in path))
    found: list[str] = []
    for node in path:
        names = inputs_of(node)
        if node.op_type == "RotaryEmbedding":
            found += names[1:3] if len(names) == 3 or not names[3] else []
        elif node.op_type == "Mul":
            found += [n for n in names if n not in inside and len(trace.shape(n)) >= 2 and trace.size(n) > 1]
    return list(dict.fromkeys(found))[:6]


def _turn(u: Array, cos: Array, sin: Array, interleaved: bool, sign: int) -> tuple[Array | None, int]:
    size = cos.shape[-1]
    if size > u.shape[-1] or size % 2:
        return None, 0
    head = u[..., :size]
    try:
        turned = head * cos + sign * rotate(head, interleaved) * sin
    except ValueError:  # the table does not broadcast to this layout
        return None, 0
    return (np.concatenate([turned, u[..., size:]], -1), size) if turned.shape == head.shape else (None, 0)
