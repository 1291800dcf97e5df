"""Attention that the graph already holds as one operator of the standard (opset 23 and later)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.operands import Operand
from rewriter.attention.projections import Raised
from rewriter.attention.trace import Trace, inputs_of, label
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, ScoreBias


def is_fused(node: ir.Node) -> bool:
    """Whether a node is an attention operator of the standard."""
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def number(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute."""
    return float(node.attributes[name].value) if name in node.attributes else default


def fused_operands(trace: Trace, node: ir.Node) -> tuple[Operand, Operand, Operand, Operand]:
    """Query, key, value and result of an attention operator; raises `Refused` for forms with a cache inside."""
    names = inputs_of(node)
    used = [value.name for value in node.outputs[1:] if value.name and (value.uses() or value.is_graph_output())]
    if any(names[4:]) or used:
        raise Refused("cache-in-operator", "the attention operator holds its cache", (label(node),))
    heads = [int(number(node, "q_num_heads", 0)), *[int(number(node, "kv_num_heads", 0))] * 2]
    operands = [_operand(trace, name, count) for name, count in zip(names[:3], heads, strict=True)]
    return operands[0], operands[1], operands[2], _operand(trace, str(node.outputs[0].name), heads[0])


def _operand(trace: Trace, name: str, heads: int) -> Operand:
    shape = trace.shape(name)
    if len(shape) == 4:
        return Operand(name, (0, 1, 2, 3), shape[:2])
    return Operand(name, (0, 2, 1, 3), (shape[0], heads), heads)


def grouped(raised: Raised, heads: int) -> Raised:
    """Keys or values of an operator that repeats each head for consecutive query heads."""
    own = raised.projection.head_of
    if len(own) == heads:
        return raised
    if heads % len(own):
        raise Refused("head-counts", f"{heads} query heads do not divide over {len(own)} key heads")
    repeated = tuple(own[h * len(own) // heads] for h in range(heads))
    return replace(raised, projection=replace(raised.projection, head_of=repeated))


def fused_bias(trace: Trace, node: ir.Node, shape_ST: tuple[int, int]) -> tuple[ScoreBias, Array | None]:
    """The additive part of an attention operator, and its numbers for classification (None if it adds nothing)."""
    names = inputs_of(node)
    mask = names[3] if len(names) > 3 else ""
    causal = bool(number(node, "is_causal", 0))
    if causal and mask:
        raise Refused("causal-and-mask", "the operator applies a mask and causality", (label(node),))
    if causal:
        allowed = np.tril(np.ones(shape_ST, bool))
        return ScoreBias("causal"), np.where(allowed, 0.0, -np.inf)[None, None]
    if not mask:
        return ScoreBias(), None
    value = trace.value(mask)
    if value.shape[-2:] != shape_ST and value.shape[-1] != shape_ST[1]:
        raise Refused("mask-shape", "the mask is shorter than the keys", (label(node),))
    axis = value.shape[-3] if value.ndim > 2 else 1
    numbers = np.where(value, 0.0, -np.inf) if value.dtype == np.bool_ else value
    shape = np.broadcast_shapes(numbers.shape, (1, 1, *shape_ST))
    return ScoreBias("bool" if value.dtype == np.bool_ else "value", mask, heads_axis=axis), np.broadcast_to(
        numbers, shape
    )
