"""The standard's Attention, opset 23 and later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.asides import Aside
from rewriter.attention.fused_forms import (
    FusedForm,
    cache_of,
    named,
    number,
    operand_at,
    output_of,
    problem,
    sizes_of,
)
from rewriter.attention.fused_masks import column, count, limited, reachable, value_bias, within
from rewriter.attention.operands import Operand
from rewriter.attention.trace import Trace
from rewriter.core.refusal import Refusal
from rewriter.core.site import ScoreBias


def read_standard(trace: Trace, node: ir.Node) -> FusedForm:
    """Operands of three or four axes, a mask of any kind, a cache, lengths of a shared cache, windows."""
    names, aside = named(node, 7), Aside(trace)
    heads, kv = int(number(node, "q_num_heads", 0)), int(number(node, "kv_num_heads", 0))
    operands = tuple(operand_at(trace, name, of) for name, of in zip(names[:3], (heads, kv, kv), strict=True))
    first, second, third = operands
    problems: list[Refusal] = []
    if output_of(node, 3):
        problems.append(problem("exposed-probabilities", "the operator gives its scores away", node))
    caches = (cache_of(node, names[4], 1), cache_of(node, names[5], 2))
    return FusedForm(
        (first, second, third),
        operand_at(trace, str(node.outputs[0].name), heads),
        sizes_of(trace, operands),
        aside,
        _bias(trace, aside, node, names, operands),
        caches,
        empty_rows="zero",
        problems=problems,
    )


def _bias(trace: Trace, aside: Aside, node: ir.Node, names: list[str], operands: tuple[Operand, ...]) -> ScoreBias:
    causal = bool(number(node, "is_causal", 0))
    left, right = (int(number(node, f"{side}_window_size", -1)) for side in ("left", "right"))
    mask = _padded(trace, aside, names, operands)
    if not names[6] and left < 0 and right < 0:
        bias = value_bias(trace, mask)
        aligned = ("end" if names[4] else "start") if causal else ""
        return replace(bias, also_causal=aligned)
    queries, keys = _lengths(aside, names, operands)
    shift = aside.length(names[4], 2) if names[4] else aside.whole(0)
    rows = aside.op("Unsqueeze", count(aside, queries), aside.ints(1))
    allowed = ""
    if names[6]:
        allowed = aside.unsqueeze(within(aside, names[6], "", keys), 1, 2)
        if not names[4]:
            lengths = aside.op("Reshape", column(aside, names[6]), aside.ints(-1, 1, 1, 1))
            shift = aside.op("Sub", lengths, queries)
    near = ""
    if causal or max(left, right) >= 0:
        near = reachable(aside, aside.op("Add", rows, shift), keys, causal, left, right)
    return limited(trace, aside, mask, aside.op("And", allowed, near) if allowed and near else allowed or near)


def _lengths(aside: Aside, names: list[str], operands: tuple[Operand, ...]) -> tuple[str, str]:
    """Numbers of queries and of all keys, as values."""
    axes = [1 if operand.split else 2 for operand in operands[:2]]
    queries, keys = (aside.length(operand.name, axis) for operand, axis in zip(operands[:2], axes, strict=True))
    return queries, aside.op("Add", keys, aside.length(names[4], 2)) if names[4] else keys


def _padded(trace: Trace, aside: Aside, names: list[str], operands: tuple[Operand, ...]) -> str:
    """The mask; a shorter one than the keys hides the rest of them."""
    mask = names[3]
    total = sizes_of(trace, operands)[1] + (trace.shape(names[4])[2] if names[4] else 0)
    if not mask or trace.shape(mask)[-1] in (1, total):
        return mask
    missing = aside.op("Sub", _lengths(aside, names, operands)[1], aside.length(mask, len(trace.shape(mask)) - 1))
    lead = aside.op("Slice", aside.op("Shape", mask), aside.ints(0), aside.ints(-1))
    shape = aside.op("Concat", lead, aside.op("Reshape", missing, aside.ints(1)), axis=0)
    boolean = trace.value(mask).dtype == np.bool_
    fill = aside.constant(np.array(False)) if boolean else aside.number(-np.inf)
    return aside.op("Concat", mask, aside.op("Expand", fill, shape), axis=-1)
