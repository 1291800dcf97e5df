"""Composite operators but linear layers, lowered to our templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.kernels import attention, flash, flash_bf16
from rewriter.runtimes.tvm.lowering import Lowering, is_float32
from rewriter.runtimes.tvm.operators.attention_written import written_out
from rewriter.runtimes.tvm.operators.reductions import norm_call
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
ROLES = ("query", "key", "value")


@lowers("rewriter:Attention")
def _attention(lowering: Lowering, node: Node) -> Any:
    """Operands may be windows of wider buffers: attributes `*_window` = (offset, width) after packing."""
    if node.input(4) or node.input(5):
        return written_out(lowering, node)
    operands = {role: _operand(lowering, node, index, role) for index, role in enumerate(ROLES)}
    batch = max(operand.shape[0] for operand in operands.values())
    for role, operand in operands.items():
        if operand.shape[0] != batch:
            operands[role] = replace(operand, batch=0)
    tokens = {role: operand.shape[-2] for role, operand in operands.items()}
    bias, value = _bias(lowering, node)
    spec = attention.Attention(
        batch, tokens["query"], tokens["key"], operands["query"], operands["key"], operands["value"],
        *_head_maps(node),
        float(node.attributes["scale"]), float(node.attributes.get("softcap", 0.0)), bias,
        "zero" if node.attributes.get("empty_rows", "nan") == "zero" else "nan", lowering.lanes, lowering.threads,
    )  # fmt: skip
    asked = node.attributes.get("precision", "fp32") == "bf16" and lowering.target.multiplies("bf16")
    # Shapes it does not serve, and processors without it, get more digits than asked for at the same meaning.
    rounding = asked and flash_bf16.serves(spec)
    tile = lowering.tiles.flash(spec, "bf16" if rounding else "fp32")
    name, make = ("flash_bf16", flash_bf16.make_flash_bf16) if rounding else ("flash", flash.make_flash)
    kernel = lowering.kernels.get(name, (spec, tile, name), lambda unique: make(spec, tile, unique))
    inputs = [lowering.value(node.inputs[index]) for index in range(3)] + ([] if value is None else [value])
    return lowering.call(kernel, inputs, ((batch, spec.S, spec.heads * spec.value.dim), "float32"))


def _head_maps(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    query, key, value = (tuple(integers(node.attributes[f"{role}_head_of"])) for role in ROLES)
    return query, key, value


def _operand(lowering: Lowering, node: Node, index: int, role: str) -> attention.Operand:
    name, heads = node.inputs[index], int(node.attributes[f"{role}_heads"])
    if not is_float32(lowering, name):
        raise lowering.unsupported(node, f"{role} of dtype {lowering.dtype(name)}")
    shape, window = lowering.shape(name), node.attributes.get(f"{role}_window")
    if window is None:
        return attention.Operand.of(shape, heads)
    offset, width = integers(window)
    _, tokens, whole = shape
    return attention.Operand(shape, heads, width // heads, tokens * whole, whole, width // heads, offset)


def _bias(lowering: Lowering, node: Node) -> tuple[attention.Bias | None, Any]:
    name, kind = node.input(3), str(node.attributes.get("bias_kind", "none"))
    if not name or kind == "none":
        return None, None
    shape, value = lowering.shape(name), lowering.value(name)
    wide = (*(1,) * (4 - len(shape)), *shape)
    if wide != shape:
        value = lowering.builder.emit(op.reshape(value, wide))
    if kind == "bool":
        if lowering.program.dtype(name) != np.bool_:
            value = lowering.builder.emit(op.not_equal(value, relax.const(0, lowering.dtype(name))))
        return attention.Bias(wide, "bool"), value
    if not is_float32(lowering, name):
        value = lowering.builder.emit(op.astype(value, "float32"))
    return attention.Bias(wide), value


@lowers("rewriter:SplitHeads")
def _split_heads(lowering: Lowering, node: Node) -> Any:
    batch, heads, tokens, dim = lowering.shape(node.outputs[0])
    return op.permute_dims(op.reshape(lowering.value(node.inputs[0]), (batch, tokens, heads, dim)), [0, 2, 1, 3])


@lowers("rewriter:HeadNorm")
def _head_norm(lowering: Lowering, node: Node) -> Any:
    kind, epsilon = str(node.attributes["kind"]), float(node.attributes["epsilon"])
    return norm_call(lowering, kind, epsilon, node.inputs[0], "", node.inputs[1], node.input(2))


@lowers("rewriter:Rotary")
def _rotary(lowering: Lowering, node: Node) -> Any:
    """u * cos + sign * rotate(u) * sin on the leading `size` dims; rotation is by halves, or by neighbours."""
    x, size = lowering.value(node.inputs[0]), int(node.attributes["size"])
    shape, emit = lowering.shape(node.inputs[0]), lowering.builder.emit
    last = len(shape) - 1
    head = x if size == shape[-1] else emit(op.strided_slice(x, [last], [0], [size]))
    cos, sin = (emit(op.multiply(lowering.value(name), relax.const(factor, "float32"))) for name, factor in (
        (node.inputs[1], 1.0), (node.inputs[2], float(node.attributes.get("sign", 1)))
    ))  # fmt: skip
    turned = _rotate(emit, head, (*shape[:-1], size), bool(node.attributes.get("interleaved", 0)))
    result = op.add(op.multiply(head, cos), op.multiply(turned, sin))
    if size == shape[-1]:
        return result
    return op.concat([emit(result), emit(op.strided_slice(x, [last], [size], [shape[-1]]))], last)


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
