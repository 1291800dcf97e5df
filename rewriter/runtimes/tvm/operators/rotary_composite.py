"""The rotary composite: one kernel where halves are turned, else operators of Relax."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rewriter.runtimes.tvm.kernels.rotary import Rotary, make_rotary
from rewriter.runtimes.tvm.lowering import Lowering, by_template
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("rewriter:Rotary")
def _rotary(lowering: Lowering, node: Node) -> Any:
    """u * cos + sign * rotate(u) * sin on the leading `size` dims; with `flat`, x is as a projection leaves it."""
    batch, heads, tokens, dim = lowering.shape(node.outputs[0])
    table, flat = lowering.shape(node.inputs[1]), bool(node.attributes.get("flat", 0))
    spec = Rotary(
        batch, heads, tokens, dim, int(node.attributes["size"]), (*(1,) * (4 - len(table)), *table),  # type: ignore[arg-type]
        float(node.attributes.get("sign", 1)), flat, lowering.lanes, lowering.threads,
    )  # fmt: skip
    same = table == lowering.shape(node.inputs[2]) and len(table) <= 4
    plain = (
        same and not int(node.attributes.get("interleaved", 0)) and all(by_template(lowering, n) for n in node.inputs)
    )
    if not plain or not spec.serves:
        return _written_out(lowering, node, flat)
    kernel = lowering.kernels.get("rotary", spec, lambda unique: make_rotary(spec, unique))
    tables = [lowering.value(name) for name in node.inputs[1:3]]
    if table != spec.table:
        tables = [lowering.builder.emit(op.reshape(value, spec.table)) for value in tables]
    return lowering.call(kernel, [lowering.value(node.inputs[0]), *tables], ((batch, heads, tokens, dim), "float32"))


def _written_out(lowering: Lowering, node: Node, flat: bool) -> Any:
    x, size, emit = lowering.value(node.inputs[0]), int(node.attributes["size"]), lowering.builder.emit
    shape = lowering.shape(node.outputs[0])
    batch, heads, tokens, dim = shape
    if flat:
        x = emit(op.permute_dims(emit(op.reshape(x, (batch, tokens, heads, dim))), [0, 2, 1, 3]))
    head = x if size == dim else emit(op.strided_slice(x, [3], [0], [size]))
    cos, sin = (emit(op.multiply(lowering.value(name), relax.const(factor, "float32"))) for name, factor in (
        (node.inputs[1], 1.0), (node.inputs[2], float(node.attributes.get("sign", 1)))
    ))  # fmt: skip
    turned = _rotate(emit, head, (*shape[:-1], size), bool(node.attributes.get("interleaved", 0)))
    result = op.add(op.multiply(head, cos), op.multiply(turned, sin))
    return result if size == dim else op.concat([emit(result), emit(op.strided_slice(x, [3], [size], [dim]))], 3)


def _rotate(emit: Any, head: Any, shape: tuple[int, ...], interleaved: bool) -> Any:
    axis, size = len(shape) - 1, shape[-1]
    if not interleaved:
        first = emit(op.strided_slice(head, [axis], [0], [size // 2]))
        second = emit(op.strided_slice(head, [axis], [size // 2], [size]))
        return emit(op.concat([emit(op.negative(second)), first], axis))
    pairs = emit(op.reshape(head, (*shape[:-1], size // 2, 2)))
    even = emit(op.strided_slice(pairs, [axis + 1], [0], [1]))
    odd = emit(op.strided_slice(pairs, [axis + 1], [1], [2]))
    return emit(op.reshape(emit(op.concat([emit(op.negative(odd)), even], axis + 1)), shape))
