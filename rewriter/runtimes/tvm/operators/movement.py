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


def _within(lowering: Lowering, name: str, sizes: np.ndarray) -> Any:
    """Indices from the front, and inside: what lies outside would be read or written beyond the tensor."""
    known = lowering.program.constant(name)
    if known is not None:
        return lowering.array(np.clip(np.where(known < 0, known + sizes, known), 0, sizes - 1).astype(known.dtype))
    kind, emit, x = lowering.dtype(name), lowering.builder.emit, lowering.value(name)
    whole, zero = (relax.const(np.asarray(value, kind), kind) for value in (sizes, np.zeros_like(sizes)))
    last = relax.const(np.asarray(sizes - 1, kind), kind)
    front = emit(op.where(emit(op.less(x, zero)), emit(op.add(x, whole)), x))
    return emit(op.minimum(emit(op.maximum(front, zero)), last))


def _elements(lowering: Lowering, node: Node) -> tuple[Any, int]:
    """(indices, axis) of an operator that takes elements along one axis."""
    axis, shape = int(node.attributes.get("axis", 0)), lowering.shape(node.inputs[0])
    return _within(lowering, node.inputs[1], np.asarray(shape[axis % len(shape)])), axis


def _points(lowering: Lowering, node: Node, first: int = 0) -> Any:
    """Indices of an operator whose last axis of indices is a point in the leading axes from `first` on."""
    count = lowering.shape(node.inputs[1])[-1]
    return _within(lowering, node.inputs[1], np.asarray(lowering.shape(node.inputs[0])[first : first + count]))


@lowers("GatherElements")
def _gather_elements(lowering: Lowering, node: Node) -> Any:
    return op.gather_elements(lowering.value(node.inputs[0]), *_elements(lowering, node))


@lowers("GatherND")
def _gather_nd(lowering: Lowering, node: Node) -> Any:
    batch = int(node.attributes.get("batch_dims", 0))
    return op.gather_nd(lowering.value(node.inputs[0]), _points(lowering, node, batch), batch)


@lowers("ScatterND")
def _scatter_nd(lowering: Lowering, node: Node) -> Any:
    reduction = str(node.attributes.get("reduction", "none"))
    data, updates = lowering.value(node.inputs[0]), lowering.value(node.inputs[2])
    return op.scatter_nd(data, _points(lowering, node), updates, "update" if reduction == "none" else reduction)


@lowers("ScatterElements", "Scatter")
def _scatter_elements(lowering: Lowering, node: Node) -> Any:
    reduction = str(node.attributes.get("reduction", "none"))
    data, updates = lowering.value(node.inputs[0]), lowering.value(node.inputs[2])
    indices, axis = _elements(lowering, node)
    return op.scatter_elements(data, indices, updates, axis, "update" if reduction == "none" else reduction)


@lowers("Pad")
def _pad(lowering: Lowering, node: Node) -> Any:
    pads, fill, axes = (lowering.constant(node, index) for index in (1, 2, 3))
    amounts = integers(pads if pads is not None else node.attributes["pads"])
    mode, shape = str(node.attributes.get("mode", "constant")), lowering.shape(node.inputs[0])
    chosen = [axis % len(shape) for axis in (range(len(shape)) if axes is None else integers(axes))]
    before, after = dict.fromkeys(range(len(shape)), 0), dict.fromkeys(range(len(shape)), 0)
    before |= dict(zip(chosen, amounts[: len(chosen)], strict=True))
    after |= dict(zip(chosen, amounts[len(chosen) :], strict=True))
    if mode != "constant" or min(amounts, default=0) < 0:
        return _padded_by_rows(lowering, node, mode, before, after)
    pairs = [amount for axis in range(len(shape)) for amount in (before[axis], after[axis])]
    value = float(node.attributes.get("value", 0.0)) if fill is None else fill.reshape(-1)[0].item()
    kind = lowering.dtype(node.inputs[0])
    if kind == "bool":  # Relax pads numbers only
        whole = lowering.builder.emit(op.astype(lowering.value(node.inputs[0]), "int32"))
        return op.astype(lowering.builder.emit(op.nn.pad(whole, pairs, "constant", int(value))), "bool")
    return op.nn.pad(lowering.value(node.inputs[0]), pairs, "constant", float(value))


def _padded_by_rows(lowering: Lowering, node: Node, mode: str, before: dict[int, int], after: dict[int, int]) -> Any:
    """Edges, reflections and what is wrapped round: rows taken again, one axis after the other."""
    kinds = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}
    if mode not in kinds:
        raise lowering.unsupported(node, f"mode {mode!r} with negative amounts")
    x = lowering.value(node.inputs[0])
    for axis, size in enumerate(lowering.shape(node.inputs[0])):
        low, high = before[axis], after[axis]
        if (low, high) == (0, 0):
            continue
        rows = np.pad(np.arange(size), (max(low, 0), max(high, 0)), mode=kinds[mode])  # type: ignore[call-overload]
        rows = rows[max(-low, 0) : len(rows) - max(-high, 0)]
        x = lowering.builder.emit(op.take(x, lowering.array(rows.astype(np.int64)), axis))
    return x


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


@lowers("DepthToSpace", "SpaceToDepth")
def _blocks(lowering: Lowering, node: Node) -> Any:
    """Channels to pixels, or back."""
    n, c, h, w = lowering.shape(node.inputs[0])
    size, x = int(node.attributes["blocksize"]), lowering.value(node.inputs[0])
    if node.op == "SpaceToDepth":
        parted = op.reshape(x, (n, c, h // size, size, w // size, size))
        return op.reshape(op.permute_dims(parted, [0, 3, 5, 1, 2, 4]), lowering.shape(node.outputs[0]))
    if str(node.attributes.get("mode", "DCR")) == "DCR":
        turned = op.permute_dims(op.reshape(x, (n, size, size, c // size**2, h, w)), [0, 3, 4, 1, 5, 2])
    else:
        turned = op.permute_dims(op.reshape(x, (n, c // size**2, size, size, h, w)), [0, 1, 4, 2, 5, 3])
    return op.reshape(turned, lowering.shape(node.outputs[0]))


@lowers("TopK")
def _top(lowering: Lowering, node: Node) -> Any:
    """Equal numbers keep their order: the first of them comes first."""
    axis, count = int(node.attributes.get("axis", -1)), lowering.constant(node, 1)
    k = int(node.attributes["k"]) if count is None else int(count.reshape(-1)[0])
    largest = bool(node.attributes.get("largest", 1))
    found = lowering.builder.emit(op.topk(lowering.value(node.inputs[0]), k, axis, "both", largest, "int64"))
    return [relax.TupleGetItem(found, 0), relax.TupleGetItem(found, 1)]
