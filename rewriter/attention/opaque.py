"""Operands whose making is not understood, kept as values: brought to (batch, heads, tokens, dim) by views."""

from __future__ import annotations

import numpy as np

from rewriter.attention.asides import Aside
from rewriter.attention.linears import linears_before
from rewriter.attention.operands import Operand
from rewriter.attention.projections import Raised
from rewriter.attention.trace import Trace, outputs_of
from rewriter.core.refusal import Refused
from rewriter.core.site import Projection


def opaque_operand(trace: Trace, operand: Operand, why: str, batch: int = 0) -> Raised:
    """The operand as the graph computes it. One leading axis is `batch` items by heads (without it: items alone), of
    three or more one tells heads. Raises `Refused` for parts of packed values and where items are shared.
    """
    if operand.split or operand.part is not None or operand.heads is not None:
        raise Refused("opaque-layout", why)
    aside = Aside(trace)
    name, rank = operand.name, len(operand.lead) + 2
    if operand.axes != tuple(range(len(operand.axes))):
        name = aside.op("Transpose", name, perm=list(operand.axes))
    if operand.new:
        name = aside.unsqueeze(name, *operand.new)
    if trace.value(name).shape[0] != operand.lead[0]:
        raise Refused("opaque-layout", f"shared by all items; {why}")
    if rank == 3:
        count = operand.lead[0] // (operand.heads_first or batch or operand.lead[0])
        if operand.heads_first:
            sizes = [aside.ints(count, -1), aside.size_of(name, 1), aside.size_of(name, 2)]
            name = aside.op("Transpose", aside.op("Reshape", name, aside.joined(sizes)), perm=[1, 0, 2, 3])
        else:
            name = aside.unsqueeze(name, 1) if count == 1 else _cut(aside, name, rank, count)
    elif rank > 4:
        name = _folded(trace, aside, operand, name, why)
    shape = trace.value(name).shape
    read = tuple(range(shape[1])) if shape[1] > 1 or rank != 4 else (0,) * operand.lead[1]
    projection = Projection(head_of=read, opaque=name, opaque_heads=shape[1], opaque_dim=shape[3], opaque_why=why)
    return Raised(projection, 1.0, shape[0], steps=tuple(aside.steps))


def _folded(trace: Trace, aside: Aside, operand: Operand, name: str, why: str) -> str:
    """All leading axes but that of heads as one."""
    rank = len(operand.lead) + 2
    if trace.value(name).shape[:-2] != operand.lead:
        raise Refused("opaque-layout", f"shared between slots; {why}")
    heads = _heads_axis(trace, operand)
    order = [axis for axis in range(rank - 2) if axis != heads] + [heads, rank - 2, rank - 1]
    if order != list(range(rank)):
        name = aside.op("Transpose", name, perm=order)
    return _cut(aside, name, rank, operand.lead[heads])


def _cut(aside: Aside, name: str, rank: int, heads: int) -> str:
    sizes = [aside.ints(-1, heads), *(aside.size_of(name, axis) for axis in (rank - 2, rank - 1))]
    return aside.op("Reshape", name, aside.joined(sizes))


def _heads_axis(trace: Trace, operand: Operand) -> int:
    """The leading axis along which one channel of the projection is seen only once; the last if none is."""
    for node in linears_before(trace, operand.name)[:1]:
        before = trace.value(outputs_of(node)[0])
        moved = before.copy()
        moved[..., 0] += np.random.default_rng(5).standard_normal(moved[..., 0].shape)
        results = trace.probe(outputs_of(node)[0], operand.name, [before, moved])
        if results is None:
            continue
        touched = (operand.arrange(results[0]) != operand.arrange(results[1])).any((-1, -2))
        for axis, size in enumerate(operand.lead):
            others = tuple(other for other in range(touched.ndim) if other != axis)
            if size > 1 and int(touched.any(others).sum()) == 1:
                return axis
    return len(operand.lead) - 1
