"""Composite operators but linear layers, lowered to our templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.kernels import attention
from rewriter.runtimes.tvm.lowering import Lowering, is_float32
from rewriter.runtimes.tvm.operators.attention_call import attend
from rewriter.runtimes.tvm.operators.reductions import norm_call
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
ROLES = ("query", "key", "value")


@lowers("rewriter:Attention")
def _attention(lowering: Lowering, node: Node) -> Any:
    """Operands may be windows of wider buffers: attributes `*_window` = (offset, width) after packing."""
    operands = {role: _operand(lowering, node, index, role) for index, role in enumerate(ROLES)}
    batch = max(operand.shape[0] for operand in operands.values())
    for role, operand in operands.items():
        if operand.shape[0] != batch:
            operands[role] = replace(operand, batch=0)
    tokens = {role: operand.shape[-2] for role, operand in operands.items()}
    heads = len(node.attributes["query_head_of"])
    bias, kept = _bias(lowering, node), _kept(lowering, node)
    spec = attention.Attention(
        batch, tokens["query"], tokens["key"], operands["query"], operands["key"], operands["value"],
        *_head_maps(node),
        float(node.attributes["scale"]), float(node.attributes.get("softcap", 0.0)), bias and bias[0],
        "zero" if node.attributes.get("empty_rows", "nan") == "zero" else "nan", lowering.lanes, lowering.threads,
        kept and kept[0], bool(node.input(5)),
    )  # fmt: skip
    inputs = [lowering.value(node.inputs[index]) for index in range(3)]
    inputs += [given[1] for given in (bias, kept) if given is not None]
    if spec.sink:
        inputs.append(lowering.builder.emit(op.reshape(lowering.value(node.input(5)), (heads,))))
    return attend(lowering, spec, inputs, str(node.attributes.get("precision", "fp32")))


def _head_maps(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    query, key, value = (tuple(integers(node.attributes[f"{role}_head_of"])) for role in ROLES)
    return query, key, value


def _operand(lowering: Lowering, node: Node, index: int, role: str) -> attention.Operand:
    name, heads = node.inputs[index], int(node.attributes[f"{role}_heads"])
    shape, window = lowering.shape(name), node.attributes.get(f"{role}_window")
    if window is None and role != "query" and lowering.dtype(name) == "bfloat16":
        return attention.Operand.of(shape, heads, "bfloat16")  # see `caches.read_narrow`
    if not is_float32(lowering, name):
        raise lowering.unsupported(node, f"{role} of dtype {lowering.dtype(name)}")
    if window is None:
        return attention.Operand.of(shape, heads)
    offset, width = integers(window)
    _, tokens, whole = shape
    return attention.Operand(shape, heads, width // heads, tokens * whole, whole, width // heads, offset)


def _bias(lowering: Lowering, node: Node) -> tuple[attention.Bias, Any] | None:
    name, kind = node.input(3), str(node.attributes.get("bias_kind", "none"))
    if not name or kind == "none":
        return None
    wide, value = _of_rank_4(lowering, name)
    if kind == "bool":
        return attention.Bias(wide, "bool"), _as_bool(lowering, name, value)
    if not is_float32(lowering, name):
        value = lowering.builder.emit(op.astype(value, "float32"))
    return attention.Bias(wide), value


def _kept(lowering: Lowering, node: Node) -> tuple[attention.Bias, Any] | None:
    name = node.input(4)
    if not name:
        return None
    wide, value = _of_rank_4(lowering, name)
    return attention.Bias(wide, "bool"), _as_bool(lowering, name, value)


def _of_rank_4(lowering: Lowering, name: str) -> tuple[tuple[int, ...], Any]:
    shape, value = lowering.shape(name), lowering.value(name)
    wide = (*(1,) * (4 - len(shape)), *shape)
    return wide, value if wide == shape else lowering.builder.emit(op.reshape(value, wide))


def _as_bool(lowering: Lowering, name: str, value: Any) -> Any:
    if lowering.program.dtype(name) == np.bool_:
        return value
    return lowering.builder.emit(op.not_equal(value, relax.const(0, lowering.dtype(name))))


@lowers("rewriter:SplitHeads")
def _split_heads(lowering: Lowering, node: Node) -> Any:
    batch, heads, tokens, dim = lowering.shape(node.outputs[0])
    return op.permute_dims(op.reshape(lowering.value(node.inputs[0]), (batch, tokens, heads, dim)), [0, 2, 1, 3])


@lowers("rewriter:HeadNorm")
def _head_norm(lowering: Lowering, node: Node) -> Any:
    kind, epsilon = str(node.attributes["kind"]), float(node.attributes["epsilon"])
    return norm_call(lowering, kind, epsilon, node.inputs[0], "", node.inputs[1], node.input(2))
