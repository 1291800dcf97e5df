"""The standard's own rotary embedding (opset 23) and that of ONNX Runtime, where nobody raised them to a composite."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("RotaryEmbedding")
def _standard(lowering: Lowering, node: Node) -> Any:
    x, cos, sin, positions = (node.input(index) for index in range(4))
    return _turned(lowering, node, x, cos, sin, positions)


@lowers("com.microsoft:RotaryEmbedding")
def _microsoft(lowering: Lowering, node: Node) -> Any:
    x, positions, cos, sin = node.inputs[:4]
    if len(lowering.shape(positions)) != 2 or int(node.attributes.get("is_packed_batching", 0)):
        raise lowering.unsupported(node, "one offset for all positions, or packed batching")
    return _turned(lowering, node, x, cos, sin, positions)


def _turned(lowering: Lowering, node: Node, x: str, cos: str, sin: str, positions: str) -> Any:
    emit, shape = lowering.builder.emit, lowering.shape(x)
    value, flat = lowering.value(x), len(shape) == 3
    tables = [_table(lowering, name, positions) for name in (cos, sin)]
    half = int(tables[0].ty.shape.values[-1])
    size = int(node.attributes.get("rotary_embedding_dim", 0)) or (2 * half if flat else shape[-1])
    if flat:
        heads = int(node.attributes.get("num_heads", 0)) or shape[2] // size
        parted = emit(op.reshape(value, (*shape[:2], heads, shape[2] // heads)))
        value = emit(op.permute_dims(parted, [0, 2, 1, 3]))
    dim = shape[2] // heads if flat else shape[3]
    leading = value if size == dim else emit(op.strided_slice(value, [3], [0], [size]))
    result = _pairs(emit, leading, tables, size, bool(node.attributes.get("interleaved", 0)))
    if size != dim:
        result = emit(op.concat([result, emit(op.strided_slice(value, [3], [size], [dim]))], 3))
    return op.reshape(emit(op.permute_dims(result, [0, 2, 1, 3])), shape) if flat else result


def _table(lowering: Lowering, name: str, positions: str) -> Any:
    """(B, 1, S, half) of a table, with rows taken by position."""
    value = lowering.value(name)
    if positions:
        value = lowering.builder.emit(op.take(value, lowering.value(positions), 0))
    return lowering.builder.emit(op.expand_dims(value, 1))


def _pairs(emit: Any, x: Any, tables: list[Any], size: int, interleaved: bool) -> Any:
    """(first * cos - second * sin, first * sin + second * cos), pairs being neighbours or half the dims apart."""
    half = size // 2
    cos, sin = (emit(op.strided_slice(table, [3], [0], [half])) for table in tables)
    step = [2] if interleaved else [1]
    spans = (([0], [size]), ([1], [size])) if interleaved else (([0], [half]), ([half], [size]))
    first, second = (emit(op.strided_slice(x, [3], start, end, step)) for start, end in spans)
    one = emit(op.subtract(op.multiply(first, cos), op.multiply(second, sin)))
    two = emit(op.add(op.multiply(first, sin), op.multiply(second, cos)))
    if not interleaved:
        return emit(op.concat([one, two], 3))
    batch, heads, tokens = (int(axis) for axis in x.ty.shape.values[:3])
    return emit(op.reshape(emit(op.stack([one, two], 4)), (batch, heads, tokens, size)))
