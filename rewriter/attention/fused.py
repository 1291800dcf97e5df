"""Attention that the graph already holds as one operator: the standard's (opset 23 on) and those of com.microsoft.

Each operator is read into the same nouns: where queries, keys and values enter, what it adds to them and to the scores,
which cache it holds. What cannot be written anew is a problem on record; the site is found and mapped all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.operands import Operand
from rewriter.attention.projections import Raised
from rewriter.attention.recipes import stored
from rewriter.attention.trace import Trace, inputs_of, label
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, Projection, ScoreBias

MICROSOFT = "com.microsoft"
FUSED = {("", "Attention"), ("ai.onnx", "Attention")} | {
    (MICROSOFT, name) for name in ("Attention", "MultiHeadAttention", "GroupQueryAttention")
}


def is_fused(node: ir.Node) -> bool:
    """Whether a node is an attention operator that can be read."""
    return (node.domain, node.op_type) in FUSED


def number(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute."""
    return float(node.attributes[name].value) if name in node.attributes else default


@dataclass(frozen=True)
class FusedForm:
    """An attention operator: three operands, or the input and packed weight they are made from.

    `caches` are (past, present) names of keys and values; `added` is what the operator adds to queries, keys, values.
    """

    operands: tuple[Operand, Operand, Operand] | None
    context: Operand
    dims: tuple[int, int]
    mask: str = ""  # added to the scores, or True where attending is allowed
    padding: str = ""  # (B, T), not zero where a key is valid
    padding_fill: float = 0.0
    causal: str = ""  # aligned at the "start" or at the "end" of the keys
    caches: tuple[tuple[str, str], tuple[str, str]] = (("", ""), ("", ""))
    added: tuple[Array, ...] = ()
    empty_rows: str = "nan"
    problems: tuple[Refusal, ...] = field(default=())


def read_fused(trace: Trace, node: ir.Node) -> FusedForm:
    """What an attention operator does; raises `Refused` for forms that are not read at all."""
    if not node.domain or node.domain == "ai.onnx":
        return _standard(trace, node)
    kinds = {"MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped_query, "Attention": _packed}
    return kinds[node.op_type](trace, node)


def _named(node: ir.Node, count: int) -> list[str]:
    names = inputs_of(node)
    return names + [""] * (count - len(names))


def _output(node: ir.Node, index: int) -> str:
    """The name of an output that something reads; "" otherwise."""
    value = node.outputs[index] if index < len(node.outputs) else None
    used = value is not None and value.name and (value.uses() or value.is_graph_output())
    return str(value.name) if used and value is not None else ""


def _operand(trace: Trace, name: str, heads: int) -> Operand:
    shape = trace.shape(name)
    if len(shape) == 4:
        return Operand(name, (0, 1, 2, 3), shape[:2])
    if len(shape) != 3 or not heads or shape[2] % heads:
        raise Refused("operand-form", f"an operand of {len(shape)} axes for {heads} heads")
    return Operand(name, (0, 2, 1, 3), (shape[0], heads), heads)


def _problem(code: str, why: str, node: ir.Node) -> Refusal:
    return Refusal(code, why, (label(node),))


def _sizes(trace: Trace, operands: tuple[Operand, Operand, Operand]) -> tuple[int, int]:
    query, key, _ = (operand.arrange(trace.value(operand.name)) for operand in operands)
    return int(query.shape[-2]), int(key.shape[-2])


def _standard(trace: Trace, node: ir.Node) -> FusedForm:
    names = _named(node, 7)
    heads, kv = int(number(node, "q_num_heads", 0)), int(number(node, "kv_num_heads", 0))
    operands = (_operand(trace, names[0], heads), _operand(trace, names[1], kv), _operand(trace, names[2], kv))
    context = _operand(trace, str(node.outputs[0].name), heads)
    problems = []
    if names[6]:
        problems.append(_problem("cache-in-operator", "the operator is told the length of its cache", node))
    if _output(node, 3):
        problems.append(_problem("exposed-probabilities", "the operator gives its scores away", node))
    if any(number(node, name, -1) >= 0 for name in ("left_window_size", "right_window_size")):
        problems.append(_problem("window-in-operator", "the operator applies a window", node))
    caches = ((names[4], _output(node, 1)), (names[5], _output(node, 2)))
    causal = ("end" if names[4] else "start") if number(node, "is_causal", 0) else ""
    return FusedForm(operands, context, _sizes(trace, operands), names[3], causal=causal, caches=caches,
                     empty_rows="zero", problems=tuple(problems))  # fmt: skip


def _multi_head(trace: Trace, node: ir.Node) -> FusedForm:
    names = _named(node, 10)
    heads = int(number(node, "num_heads", 0))
    if not names[1]:
        shape = trace.shape(names[0])
        if len(shape) != 5:
            raise Refused("operand-form", "queries alone that are not packed", (label(node),))
        lead = (shape[0], heads)
        parts = [Operand(names[0], (0, 2, 1, 3), lead, part=(3, i)) for i in range(3)]
    elif len(trace.shape(names[1])) == 5:
        lead = (trace.shape(names[1])[0], heads)
        parts = [_operand(trace, names[0], heads)]
        parts += [Operand(names[1], (0, 2, 1, 3), lead, part=(3, i)) for i in range(2)]
    else:
        parts = [_operand(trace, name, heads) for name in names[:3]]
    operands = (parts[0], parts[1], parts[2])
    problems = []
    if any(names[8:]) or _output(node, 3):
        problems.append(
            _problem("cache-in-operator", "the operator shares a cache buffer or gives its scores away", node)
        )
    mask = _padding(trace, node, names[4], problems)
    caches = ((names[6], _output(node, 1)), (names[7], _output(node, 2)))
    added = _packed_bias(trace, node, names[3], operands)
    causal = "end" if number(node, "unidirectional", 0) else ""
    fill = number(node, "mask_filter_value", -10000.0)
    context = _operand(trace, str(node.outputs[0].name), heads)
    return FusedForm(operands, context, _sizes(trace, operands), names[5], mask, fill, causal, caches, added,
                     problems=tuple(problems))  # fmt: skip


def _padding(trace: Trace, node: ir.Node, name: str, problems: list[Refusal]) -> str:
    if name and len(trace.shape(name)) != 2:
        problems.append(_problem("mask-form", "padding is not given as (batch, keys)", node))
        return ""
    return name


def _packed_bias(trace: Trace, node: ir.Node, name: str, operands: tuple[Operand, ...]) -> tuple[Array, ...]:
    """(heads, dim) added to queries, keys and values."""
    if not name:
        return ()
    if name not in trace.fixed:
        raise Refused("operand-form", "what is added to the operands is computed", (label(node),))
    shapes = [operand.arrange(trace.value(operand.name)).shape[-1] for operand in operands]
    heads = operands[0].lead[1]
    cuts = np.cumsum([heads * dim for dim in shapes])[:-1]
    parts = np.split(trace.value(name).reshape(-1), cuts)
    return tuple(part.reshape(heads, -1) for part in parts)


def _grouped_query(trace: Trace, node: ir.Node) -> FusedForm:
    """Caches written at places that data decide: understood, not written anew."""
    names = _named(node, 12)
    heads, kv = int(number(node, "num_heads", 0)), int(number(node, "kv_num_heads", 0))
    if names[1]:
        operands = (_operand(trace, names[0], heads), _operand(trace, names[1], kv), _operand(trace, names[2], kv))
    else:
        shape = trace.shape(names[0])
        dim = shape[2] // (heads + 2 * kv)
        cuts = ((0, heads), (heads, heads + kv), (heads + kv, heads + 2 * kv))
        lead, whole = shape[0], heads + 2 * kv
        parts = [Operand(names[0], (0, 2, 1, 3), (lead, b - a), whole, heads=(a, b)) for a, b in cuts if dim]
        operands = (parts[0], parts[1], parts[2])
    problems = [_problem("cache-in-operator", "the operator writes its cache at places that data decide", node)]
    if number(node, "do_rotary", 0):
        problems.append(_problem("rotary-in-operator", "the operator turns queries and keys itself", node))
    context = _operand(trace, str(node.outputs[0].name), heads)
    return FusedForm(operands, context, _sizes(trace, operands), names[10], causal="end", problems=tuple(problems))


def _packed(trace: Trace, node: ir.Node) -> FusedForm:
    names = _named(node, 7)
    heads = int(number(node, "num_heads", 0))
    problems: list[Refusal] = []
    if names[4] or names[6] or number(node, "do_rotary", 0):
        problems.append(_problem("cache-in-operator", "the operator holds its cache", node))
    tokens = trace.shape(names[0])[1]
    padding = _padding(trace, node, names[3], problems)
    causal = "end" if number(node, "unidirectional", 0) else ""
    fill = number(node, "mask_filter_value", -10000.0)
    context = _operand(trace, str(node.outputs[0].name), heads)
    return FusedForm(None, context, (tokens, tokens), names[5], padding, fill, causal, problems=tuple(problems))


def packed_projections(trace: Trace, node: ir.Node) -> tuple[Raised, Raised, Raised]:
    """Queries, keys and values of com.microsoft Attention, whose one weight holds all three."""
    names = _named(node, 3)
    if names[1] not in trace.fixed or (names[2] and names[2] not in trace.fixed):
        raise Refused("operand-form", "the packed weight is computed", (label(node),))
    heads, weight = int(number(node, "num_heads", 0)), trace.value(names[1])
    sizes = [weight.shape[1] // 3] * 3
    if "qkv_hidden_sizes" in node.attributes:
        sizes = list(node.attributes["qkv_hidden_sizes"].as_ints())
    dtype, made, start = trace.weight_dtype(names[1]), [], 0
    for size in sizes:
        part = weight[:, start : start + size].reshape(len(weight), heads, -1)
        bias = trace.value(names[2])[start : start + size].reshape(heads, -1) if names[2] else None
        projection = Projection(
            source=names[0],
            weight_CGD=stored(part, dtype),
            bias_GD=None if bias is None else stored(bias, dtype),
            weight_name=trace.original_initializer(names[1]),
            bias_name=trace.original_initializer(names[2]) if names[2] else "",
            head_of=tuple(range(heads)),
        )
        made.append(Raised(projection, 1.0, trace.shape(names[0])[0]))
        start += size
    return made[0], made[1], made[2]


def grouped(raised: Raised, heads: int) -> Raised:
    """Keys or values of an operator that repeats each head for consecutive query heads."""
    own = raised.projection.head_of
    if len(own) == heads:
        return raised
    if heads % len(own):
        raise Refused("head-counts", f"{heads} query heads do not divide over {len(own)} key heads")
    repeated = tuple(own[h * len(own) // heads] for h in range(heads))
    return replace(raised, projection=replace(raised.projection, head_of=repeated))


def with_added(raised: Raised, added_GD: Array) -> Raised:
    """An operand to which the operator adds a constant per head and dim: part of the projection's bias."""
    projection = raised.projection
    plain = projection.plain and projection.head_of == tuple(range(len(added_GD)))
    if not plain or projection.weight_CGD is None:
        raise Refused("operand-form", "the operator adds to operands that are no bare projections")
    before = 0.0 if projection.bias_GD is None else projection.bias_GD.astype(np.float64)
    dtype = projection.weight_CGD.dtype
    bias_GD = stored(before + added_GD / raised.factor, np.dtype(np.float32) if dtype == np.float64 else dtype)
    return replace(raised, projection=replace(projection, bias_GD=bias_GD))


def with_cache(raised: Raised, names: tuple[str, str]) -> Raised:
    """An operand that the operator appends to a cache."""
    past, present = names
    if not past and not present:
        return raised
    if raised.projection.opaque or not present:
        raise Refused("cache-in-operator", "the operator holds a cache of values that are no projections")
    if raised.factor != 1.0:
        raise Refused("cache-in-operator", "cached values are scaled after their projection")
    return replace(raised, projection=replace(raised.projection, past=past, present=present))


def fused_bias(trace: Trace, form: FusedForm, keys: int) -> tuple[ScoreBias, Array | None]:
    """The additive part of an attention operator, and its numbers for classification (None if it adds nothing)."""
    queries, numbers = form.dims[0], np.zeros((1, 1, form.dims[0], keys))
    bias = ScoreBias(also_causal=form.causal, padding=form.padding, padding_fill=form.padding_fill)
    if form.mask:
        value = trace.value(form.mask)
        if value.shape[-1] != keys:
            raise Refused("mask-shape", "the mask is shorter than the keys")
        axis = value.shape[-3] if value.ndim > 2 else 1
        boolean = value.dtype == np.bool_
        bias = replace(bias, kind="bool" if boolean else "value", value=form.mask, heads_axis=axis)
        numbers = numbers + (np.where(value, 0.0, -np.inf) if boolean else value)
    if form.padding:
        numbers = numbers + np.where(trace.value(form.padding) != 0, 0.0, form.padding_fill)[:, None, None]
    if form.causal:
        shift = keys - queries if form.causal == "end" else 0
        numbers = numbers + np.where(np.tri(queries, keys, shift, dtype=bool), 0.0, -np.inf)
    anything = form.mask or form.padding or form.causal
    return bias, numbers if anything else None
