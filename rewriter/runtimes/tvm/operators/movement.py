"""Operators that move data or look it up, without computing."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.kernels.gather import Gather, make_gather
from rewriter.runtimes.tvm.lowering import Lowering, by_template
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _reshape(lowering: Lowering, node: Node) -> Any:
    """The target shape is the one the output had when the graph was run at these sizes."""
    for index in range(1, len(node.inputs)):
        lowering.constant(node, index)
    return op.reshape(lowering.value(node.inputs[0]), lowering.shape(node.outputs[0]))


@lowers("Expand")
def _expand(lowering: Lowering, node: Node) -> Any:
    lowering.constant(node, 1)
    return op.broadcast_to(lowering.value(node.inputs[0]), lowering.shape(node.outputs[0]))


@lowers("Tile")
def _tile(lowering: Lowering, node: Node) -> Any:
    repeats = lowering.constant(node, 1)
    assert repeats is not None
    return op.tile(lowering.value(node.inputs[0]), integers(repeats))


@lowers("Transpose")
def _transpose(lowering: Lowering, node: Node) -> Any:
    rank = len(lowering.shape(node.inputs[0]))
    order = integers(node.attributes.get("perm", range(rank - 1, -1, -1)))
    return op.permute_dims(lowering.value(node.inputs[0]), order)


@lowers("Concat")
def _concat(lowering: Lowering, node: Node) -> Any:
    return op.concat([lowering.value(name) for name in node.inputs], int(node.attributes["axis"]))


@lowers("Split")
def _split(lowering: Lowering, node: Node) -> Any:
    axis = int(node.attributes.get("axis", 0)) % len(lowering.shape(node.inputs[0]))
    lowering.constant(node, 1)
    results, start = [], 0
    for output in node.outputs:
        size = lowering.shape(output)[axis]
        x = lowering.value(node.inputs[0])
        results.append(op.strided_slice(x, [axis], [start], [start + size]))
        start += size
    return results


@lowers("Slice")
def _slice(lowering: Lowering, node: Node) -> Any:
    shape = lowering.shape(node.inputs[0])
    starts, ends, axes, steps = (lowering.constant(node, index) for index in (1, 2, 3, 4))
    if starts is None or ends is None:
        starts, ends = np.array(node.attributes["starts"]), np.array(node.attributes["ends"])
        axes = np.array(node.attributes["axes"]) if "axes" in node.attributes else None
    chosen = integers(axes) if axes is not None else list(range(len(starts)))
    strides = integers(steps) if steps is not None else [1] * len(starts)
    begin, end = [], []
    for axis, start, stop, step in zip(chosen, integers(starts), integers(ends), strides, strict=True):
        taken = range(shape[axis])[slice(start, stop, step)]
        begin.append(taken.start)
        end.append(taken.stop if taken.stop >= 0 else -shape[axis] - 1)
    x = lowering.value(node.inputs[0])
    return op.strided_slice(x, [axis % len(shape) for axis in chosen], begin, end, strides)


@lowers("Gather")
def _gather(lowering: Lowering, node: Node) -> Any:
    table, indices = node.inputs[:2]
    shape = lowering.shape(table)
    axis = int(node.attributes.get("axis", 0)) % len(shape)
    known = lowering.program.constant(indices)
    if known is not None:
        whole = np.where(known < 0, known + shape[axis], known)
        if whole.ndim == 0:
            taken = op.strided_slice(lowering.value(table), [axis], [int(whole)], [int(whole) + 1])
            return op.reshape(taken, lowering.shape(node.outputs[0]))
        return op.take(lowering.value(table), lowering.array(whole), axis)
    if axis == 0 and by_template(lowering, table) and len(shape) >= 2 and lowering.dtype(indices) in ("int64", "int32"):
        return _gather_rows(lowering, node)
    return op.take(lowering.value(table), lowering.value(indices), axis, "wrap")


def _gather_rows(lowering: Lowering, node: Node) -> Any:
    table, indices = node.inputs[:2]
    rows, *rest = lowering.shape(table)
    spec = Gather(rows, prod(rest), lowering.shape(indices), lowering.dtype(indices), lowering.lanes)
    kernel = lowering.kernels.get("gather", spec, lambda unique: make_gather(spec, unique))
    source = lowering.value(table)
    if len(rest) > 1:
        source = lowering.builder.emit(op.reshape(source, (rows, prod(rest))))
    taken = lowering.call(kernel, [source, lowering.value(indices)], ((*spec.indices, spec.columns), "float32"))
    return taken if len(rest) == 1 else op.reshape(lowering.builder.emit(taken), lowering.shape(node.outputs[0]))


@lowers("GatherElements")
def _gather_elements(lowering: Lowering, node: Node) -> Any:
    x, indices = (lowering.value(name) for name in node.inputs)
    return op.gather_elements(x, indices, int(node.attributes.get("axis", 0)))


@lowers("GatherND")
def _gather_nd(lowering: Lowering, node: Node) -> Any:
    x, indices = (lowering.value(name) for name in node.inputs)
    return op.gather_nd(x, indices, int(node.attributes.get("batch_dims", 0)))


@lowers("ScatterND")
def _scatter_nd(lowering: Lowering, node: Node) -> Any:
    reduction = str(node.attributes.get("reduction", "none"))
    data, indices, updates = (lowering.value(name) for name in node.inputs)
    return op.scatter_nd(data, indices, updates, "update" if reduction == "none" else reduction)


@lowers("ScatterElements")
def _scatter_elements(lowering: Lowering, node: Node) -> Any:
    reduction = str(node.attributes.get("reduction", "none"))
    data, indices, updates = (lowering.value(name) for name in node.inputs)
    axis = int(node.attributes.get("axis", 0))
    return op.scatter_elements(data, indices, updates, axis, "update" if reduction == "none" else reduction)


@lowers("Pad")
def _pad(lowering: Lowering, node: Node) -> Any:
    pads = lowering.constant(node, 1)
    value, axes = lowering.constant(node, 2), lowering.constant(node, 3)
    mode, rank = str(node.attributes.get("mode", "constant")), len(lowering.shape(node.inputs[0]))
    if mode != "constant" or pads is None or axes is not None:
        raise lowering.unsupported(node, f"mode {mode!r}, or pads for some axes only")
    amounts = integers(pads)
    pairs = [amount for axis in range(rank) for amount in (amounts[axis], amounts[axis + rank])]
    fill = 0.0 if value is None else float(value.reshape(-1)[0])
    return op.nn.pad(lowering.value(node.inputs[0]), pairs, "constant", fill)


@lowers("Trilu")
def _trilu(lowering: Lowering, node: Node) -> Any:
    k = lowering.constant(node, 1)
    diagonal = 0 if k is None else int(k.reshape(-1)[0])
    choose = op.triu if int(node.attributes.get("upper", 1)) else op.tril
    return choose(lowering.value(node.inputs[0]), diagonal)


@lowers("OneHot")
def _one_hot(lowering: Lowering, node: Node) -> Any:
    depth, values = lowering.constant(node, 1), lowering.constant(node, 2)
    assert depth is not None and values is not None
    dtype, size = lowering.dtype(node.outputs[0]), int(depth.reshape(-1)[0])
    shape, axis = lowering.shape(node.outputs[0]), int(node.attributes.get("axis", -1))
    axis %= len(shape)
    index = lowering.builder.emit(op.expand_dims(lowering.value(node.inputs[0]), axis))
    kind = lowering.dtype(node.inputs[0])
    positive = lowering.builder.emit(op.where(op.less(index, relax.const(0, kind)), _plus(index, size, kind), index))
    classes = np.arange(size, dtype=kind).reshape([size if at == axis else 1 for at in range(len(shape))])
    off, on = (relax.const(value, dtype) for value in values)
    return op.where(op.equal(positive, lowering.array(classes)), on, off)


def _plus(index: Any, size: int, kind: str) -> Any:
    return op.add(index, relax.const(size, kind))
