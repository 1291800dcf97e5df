"""Attention that our kernels do not serve, in products and a softmax: scores left out, and sinks."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import integers
from rewriter.runtimes.tvm.program import Node

op = relax.op


def written_out(lowering: Lowering, node: Node) -> Any:
    """``softmax([where(kept, cap(scale * Q K^T), 0) + bias, sink]) V`` as (B, S, H * Dv), in operators of Relax."""
    emit, heads = lowering.builder.emit, int(node.attributes["heads"])
    query, key, value = (_heads(lowering, node, index, role) for index, role in enumerate(("query", "key", "value")))
    scaled = emit(op.multiply(query, _number(node.attributes["scale"])))
    scores = emit(op.matmul(scaled, emit(op.permute_dims(key, [0, 1, 3, 2]))))
    cap = float(node.attributes.get("softcap", 0.0))
    if cap:
        scores = emit(op.multiply(emit(op.tanh(emit(op.divide(scores, _number(cap))))), _number(cap)))
    if node.input(4):
        scores = emit(op.where(lowering.value(node.input(4)), scores, _number(0.0)))
    scores = _biased(lowering, node, scores)
    shapes = [lowering.shape(name) for name in node.inputs[:3]]
    batch, tokens, keys = max(shape[0] for shape in shapes), shapes[0][-2], shapes[1][-2]
    dim = shapes[2][-1] // (int(node.attributes["value_heads"]) if len(shapes[2]) == 3 else 1)
    if node.input(5):
        sink = emit(op.reshape(lowering.value(node.input(5)), (1, heads, 1, 1)))
        scores = emit(op.concat([scores, emit(op.broadcast_to(sink, (batch, heads, tokens, 1)))], 3))
    weights = emit(op.nn.softmax(scores, 3))
    if node.input(5):
        weights = emit(op.strided_slice(weights, [3], [0], [keys]))
    if node.attributes.get("empty_rows", "nan") == "zero":
        weights = emit(op.where(emit(op.isnan(weights)), _number(0.0), weights))
    mixed = emit(op.permute_dims(emit(op.matmul(weights, value)), [0, 2, 1, 3]))
    return op.reshape(mixed, (batch, tokens, heads * dim))


def _heads(lowering: Lowering, node: Node, index: int, role: str) -> Any:
    """(B, H, tokens, D) of one operand."""
    name, heads = node.inputs[index], int(node.attributes[f"{role}_heads"])
    x, shape, emit = lowering.value(name), lowering.shape(name), lowering.builder.emit
    if len(shape) == 3:
        batch, tokens, width = shape
        x = emit(op.permute_dims(emit(op.reshape(x, (batch, tokens, heads, width // heads))), [0, 2, 1, 3]))
    picks = integers(node.attributes[f"{role}_head_of"])
    if list(picks) == list(range(heads)):
        return x
    return emit(op.take(x, relax.const(np.array(picks, np.int64)), axis=1))


def _biased(lowering: Lowering, node: Node, scores: Any) -> Any:
    kind = str(node.attributes.get("bias_kind", "none"))
    if not node.input(3) or kind == "none":
        return scores
    bias = lowering.value(node.input(3))
    if kind == "bool":
        return lowering.builder.emit(op.where(bias, scores, _number(-np.inf)))
    return lowering.builder.emit(op.add(scores, bias))


def _number(value: Any) -> Any:
    return relax.const(float(value), "float32")
