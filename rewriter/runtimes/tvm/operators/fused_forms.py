"""Operators of ONNX Runtime that fuse what the table already has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.elementwise import activation_of
from rewriter.runtimes.tvm.operators.reductions import norm_call
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("com.microsoft:BiasGelu", "com.microsoft:FastGelu")
def _bias_gelu(lowering: Lowering, node: Node) -> Any:
    name = node.inputs[0]
    if node.input(1):
        name = _named(lowering, op.add(lowering.value(name), lowering.value(node.inputs[1])), node.outputs[0])
    return activation_of(lowering, node, name, "gelu" if node.op == "BiasGelu" else "gelu_tanh")


@lowers("com.microsoft:SkipLayerNormalization", "com.microsoft:SkipSimplifiedLayerNormalization")
def _skip_norm(lowering: Lowering, node: Node) -> Any:
    """Inputs x, skip, gain, beta (layer norm only), bias; outputs beyond the first: only the sum."""
    kind = "layer" if node.op == "SkipLayerNormalization" else "rms"
    x, skip, gain = node.inputs[:3]
    beta, bias = (node.input(3), node.input(4)) if kind == "layer" else ("", node.input(3))
    if lowering.wants(node, 1, 2):
        raise lowering.unsupported(node, "mean and deviation as outputs")
    if lowering.shape(skip) != lowering.shape(x):
        wide = op.broadcast_to(lowering.value(skip), lowering.shape(x))
        skip = _named(lowering, wide, node.outputs[0], "skip")
    if bias:
        x = _named(lowering, op.add(lowering.value(x), lowering.value(bias)), node.outputs[0])
    epsilon, keep = float(node.attributes.get("epsilon", 1e-12)), lowering.wants(node, 3)
    found = norm_call(lowering, kind, epsilon, x, skip, gain, beta, keep)
    return [found[0], None, None, found[1]] if keep else found


@lowers("com.microsoft:EmbedLayerNormalization")
def _embed_norm(lowering: Lowering, node: Node) -> Any:
    """Inputs ids, segments, words, places, segment table, gain, beta, mask, positions."""
    ids, segments, words, places, table, gain, beta, mask, positions = (node.input(index) for index in range(9))
    batch, tokens = lowering.shape(ids)
    rows = lowering.value(positions) if positions else lowering.array(np.arange(tokens, dtype=np.int64)[None])
    total = op.add(op.take(lowering.value(words), lowering.value(ids), 0), op.take(lowering.value(places), rows, 0))
    if segments and table:
        total = op.add(total, op.take(lowering.value(table), lowering.value(segments), 0))
    name = _named(lowering, total, node.outputs[0])
    result = norm_call(lowering, "layer", float(node.attributes.get("epsilon", 1e-12)), name, "", gain, beta)
    lengths = op.sum(lowering.value(mask), [1]) if mask else relax.const(np.zeros(batch, np.int32))
    return [result, op.astype(lengths, "int32"), lowering.env[name]]


@lowers("com.microsoft:FusedMatMul")
def _fused_matmul(lowering: Lowering, node: Node) -> Any:
    """``alpha * A B`` with the last two axes of either turned."""
    if int(node.attributes.get("transBatchA", 0)) or int(node.attributes.get("transBatchB", 0)):
        raise lowering.unsupported(node, "turned batch axes")
    a, b = (
        _turned(lowering, name, bool(node.attributes.get(flag, 0)))
        for name, flag in zip(node.inputs[:2], ("transA", "transB"), strict=True)
    )
    alpha = relax.const(float(node.attributes.get("alpha", 1.0)), lowering.dtype(node.inputs[0]))
    return op.multiply(lowering.builder.emit(op.matmul(a, b)), alpha)


def _turned(lowering: Lowering, name: str, turn: bool) -> Any:
    value, rank = lowering.value(name), len(lowering.shape(name))
    return op.permute_dims(value, [*range(rank - 2), rank - 1, rank - 2]) if turn and rank > 1 else value


def _named(lowering: Lowering, expression: Any, like: str, what: str = "sum") -> str:
    """A value of its own for an expression, of the shape and dtype of `like`."""
    name = f"{like}/{what}"
    lowering.program.values[name] = replace(lowering.program.values[like], name=name, constant=None)
    lowering.env[name] = lowering.builder.emit(expression)
    return name
