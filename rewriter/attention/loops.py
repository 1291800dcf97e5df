"""Heads in a loop: a softmax of its own for every head, results concatenated, is one attention with them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.cores import Core
from rewriter.attention.merging import merged_bias, merged_operand
from rewriter.attention.operands import Operand
from rewriter.attention.projections import Raised
from rewriter.attention.readers import AFTER_SOFTMAX
from rewriter.attention.trace import SHAPES, VIEWS, Trace, inputs_of, outputs_of
from rewriter.attention.views import view_between
from rewriter.core.refusal import Refused
from rewriter.core.site import Array

Part = tuple[Core, tuple[Raised, Raised, Raised]]
SOFTMAX_NODES = frozenset(("Softmax", "LogSoftmax", "Exp"))


@dataclass(frozen=True)
class Loop:
    """The value that joins the heads, along which axis, its parts, and the softmax of each part."""

    joined: str
    axis: int
    parts: tuple[str, ...]
    softmaxes: tuple[ir.Node, ...]


def loop_around(trace: Trace, context: str) -> Loop | None:
    """The concatenation that an attention result enters by views alone, if all it joins are such results."""
    name = context
    while True:
        readers = [node for node in trace.consumers[name] if node.op_type not in SHAPES]
        if len(readers) != 1 or readers[0].op_type not in VIEWS or name in trace.outputs:
            return None
        node, name = readers[0], outputs_of(readers[0])[0]
        if node.op_type == "Concat":
            break
    parts = tuple(inputs_of(node))
    found = [_softmax_behind(trace, part) for part in parts]
    softmaxes = [softmax for softmax in found if softmax is not None]
    if len(parts) < 2 or len({id(softmax) for softmax in softmaxes}) < len(parts):
        return None
    axis = node.attributes["axis"].as_int() % len(trace.shape(name))
    return Loop(name, axis, parts, tuple(softmaxes))


def _softmax_behind(trace: Trace, part: str) -> ir.Node | None:
    """The softmax whose probabilities enter the product that a value is a view of."""
    node = trace.producer.get(part)
    while node is not None and node.op_type in VIEWS and not trace.bilinear(node):
        node = trace.producer.get(inputs_of(node)[0])
    if node is None or not trace.bilinear(node):
        return None
    for name in inputs_of(node):
        before = trace.producer.get(name)
        while before is not None and before.op_type in AFTER_SOFTMAX and before.op_type not in SOFTMAX_NODES:
            before = trace.producer.get(inputs_of(before)[0])
        if before is not None and before.op_type in SOFTMAX_NODES:
            return before
    return None


def merged(trace: Trace, loop: Loop, part_of: Callable[[ir.Node], Part]) -> Part:
    """All heads of a loop as one core with its operands; raises `Refused` if they do not fit together."""
    parts = [part_of(node) for node in loop.softmaxes]
    cores, raised = [core for core, _ in parts], [operands for _, operands in parts]
    first, batch = cores[0], raised[0][0].batch
    if any(r.batch != batch for operands in raised for r in operands):
        raise Refused("loop-of-heads", "heads with different batch sizes")
    alike = {(core.softcap, core.empty_rows) for core in cores}
    if len(alike) > 1 or any(core.before for core in cores):
        raise Refused("loop-of-heads", "heads with different score functions")
    scales = [core.scale * query.factor * key.factor for core, (query, key, _) in parts]
    query = merged_operand(trace, [operands[0] for operands in raised], [scale / scales[0] for scale in scales])
    key, value = (merged_operand(trace, [operands[role] for operands in raised]) for role in (1, 2))
    heads = [len(operands[0].projection.head_of) for operands in raised]
    context = _context(trace, loop, cores, heads, batch)
    slots = [_slots(core.offset, batch, count) for core, count in zip(cores, heads, strict=True)]
    bias, steps = merged_bias(trace, [core.bias for core in cores], heads)
    core = replace(
        first,
        context=context,
        scale=scales[0] / (query.factor * key.factor),
        bias=bias,
        before=steps,
        offset=np.concatenate(slots, 1),
        nodes=tuple(node for core in cores for node in core.nodes),
        sink_H=_sinks(cores),
        content=("", ""),
        inner=tuple(dict.fromkeys(name for core in cores for name in core.inner)),
    )
    return core, (query, key, value)


def _sinks(cores: Sequence[Core]) -> Array | None:
    sinks = [core.sink_H for core in cores if core.sink_H is not None]
    if sinks and len(sinks) < len(cores):
        raise Refused("loop-of-heads", "some heads have a sink")
    return np.concatenate(sinks) if sinks else None


def _slots(offset: Array | None, batch: int, heads: int) -> Array:
    assert offset is not None
    return np.broadcast_to(offset.reshape(batch, -1, *offset.shape[-2:]), (batch, heads, *offset.shape[-2:]))


def _context(trace: Trace, loop: Loop, cores: Sequence[Core], heads: Sequence[int], batch: int) -> Operand:
    """How the joined value holds the heads: side by side in its last axis, or in an axis of their own."""
    rank, total = len(trace.shape(loop.joined)), sum(heads)
    if (rank, loop.axis) == (3, 2):
        axes, split = (0, 2, 1, 3), True
    elif (rank, loop.axis) in ((4, 1), (4, 2)):
        axes, split = ((0, 1, 2, 3) if loop.axis == 1 else (0, 2, 1, 3)), False
    else:
        raise Refused("loop-of-heads", f"heads joined along axis {loop.axis} of {rank}")
    for core, part, count in zip(cores, loop.parts, heads, strict=True):
        own = core.context
        view = view_between(trace, own.name, part)
        place = np.arange(trace.size(own.name)).reshape(trace.shape(own.name))
        here = Operand(part, axes, (batch, count), count if split else 0)
        if split and trace.shape(part)[-1] % count:
            raise Refused("loop-of-heads", "parts do not hold whole heads")
        if view is None or view.factor != 1.0 or view.offset.any():
            raise Refused("loop-of-heads", "heads are changed before they are joined")
        if not np.array_equal(here.arrange(view.element).reshape(-1), own.arrange(place).reshape(-1)):
            raise Refused("loop-of-heads", "heads are joined in another order of axes")
    return Operand(loop.joined, axes, (batch, total), total if split else 0)
