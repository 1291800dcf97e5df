"""Attention that the graph already holds as one operator: the standard's (opset 23 on) and those of com.microsoft.

Each operator is read into the same nouns: where queries, keys and values enter, what it adds to them and to the scores,
which cache it holds. Masks, tables and places that it computes inside itself become steps of the site. What cannot be
written anew is a problem on record; the site is found and mapped all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.asides import Aside
from rewriter.attention.fused_forms import FusedForm, Turn, number
from rewriter.attention.fused_grouped import read_grouped
from rewriter.attention.fused_masks import offset_of
from rewriter.attention.fused_microsoft import read_multi_head, read_packed
from rewriter.attention.fused_standard import read_standard
from rewriter.attention.operands import Operand
from rewriter.attention.projections import Raised, raise_operand
from rewriter.attention.recipes import stored
from rewriter.attention.trace import Trace, inputs_of, label
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, Projection, Rotary, Step

MICROSOFT = "com.microsoft"
_READERS: dict[tuple[str, str], Callable[[Trace, ir.Node], FusedForm]] = {
    ("", "Attention"): read_standard,
    ("ai.onnx", "Attention"): read_standard,
    (MICROSOFT, "Attention"): read_packed,
    (MICROSOFT, "MultiHeadAttention"): read_multi_head,
    (MICROSOFT, "GroupQueryAttention"): read_grouped,
}


def is_fused(node: ir.Node) -> bool:
    """Whether a node is an attention operator that can be read."""
    return (node.domain, node.op_type) in _READERS


@dataclass(frozen=True)
class Fused:
    """An attention operator with its operands raised, the numbers added to its scores, and the steps around it."""

    form: FusedForm
    raised: tuple[Raised, Raised, Raised]
    offset: Array  # (B or 1, H or 1, S, T)
    keys: int
    scale: float
    softcap: float
    before: tuple[Step, ...]
    after: tuple[Step, ...]


def read_fused(trace: Trace, node: ir.Node) -> Fused:
    """What an attention operator does; raises `Refused` for forms that are not read at all."""
    form = _READERS[node.domain, node.op_type](trace, node)
    if form.operands is None:
        raised = tuple(
            _cached(trace, form, part, cache)
            for part, cache in zip(packed_projections(trace, node), (None, *form.caches), strict=True)
        )
    else:
        raised = _raised(trace, form, form.operands)
    first, second, third = raised
    heads, past = len(first.projection.head_of), form.caches[0][0]
    keys = trace.shape(form.places)[1] if form.places else form.dims[1] + (trace.shape(past)[-2] if past else 0)
    offset = offset_of(trace, form.bias, form.dims[0], keys)
    scale = number(node, "scale", 0.0) or first.projection.dim**-0.5
    after = _packed_present(trace, form)
    used = (first, grouped(second, heads), grouped(third, heads))
    return Fused(form, used, offset, keys, scale, number(node, "softcap", 0.0), tuple(form.aside.steps), after)


def _packed_present(trace: Trace, form: FusedForm) -> tuple[Step, ...]:
    """Keys and values as the one value (2, B, heads, T, D) that the operator gave away."""
    if not form.packed_present:
        return ()
    aside = Aside(trace, blind=True)
    halves = [aside.unsqueeze(present, 0) for _, present in form.caches]
    aside.op("Concat", *halves, output=form.packed_present, axis=0)
    return tuple(aside.steps)


def _raised(trace: Trace, form: FusedForm, operands: tuple[Operand, Operand, Operand]) -> tuple[Raised, Raised, Raised]:
    added = form.added or (None, None, None)
    made = [_biased(trace, form, operand, part) for operand, part in zip(operands, added, strict=True)]
    if form.turn is not None:
        made[:2] = [turned(raised, form.turn) for raised in made[:2]]
    first, second, third = (
        _cached(trace, form, raised, cache) for raised, cache in zip(made, (None, *form.caches), strict=True)
    )
    if len({raised.batch for raised in (first, second, third)}) != 1:
        raise Refused("batch-sizes", f"operands with batch sizes {[r.batch for r in (first, second, third)]}")
    return first, second, third


def _biased(trace: Trace, form: FusedForm, operand: Operand, added_GD: Array | None) -> Raised:
    """An operand with what the operator adds to it: in its weights, or else written out before the site."""
    try:
        raised = raise_operand(trace, operand)
        if added_GD is None:
            return raised
        if not raised.projection.opaque:
            return with_added(raised, added_GD)
        why = raised.projection.opaque_why
    except Refused as problem:
        why = problem.refusal.why
    value = _split(form.aside, operand)
    if added_GD is not None:
        value = form.aside.op("Add", value, form.aside.constant(added_GD[:, None].astype(np.float64)))
    return opaque(trace, value, why)


def _split(aside: Aside, operand: Operand) -> str:
    """An operand as a value (B, heads, tokens, D)."""
    name = operand.name
    if operand.part is not None:
        name = aside.op("Gather", name, aside.whole(operand.part[1]), axis=operand.part[0])
    if operand.split:
        name = aside.op("Reshape", name, aside.ints(0, 0, operand.split, -1))
    if operand.heads is not None:
        start, end = operand.heads
        name = aside.op("Slice", name, aside.ints(start), aside.ints(end), aside.ints(2))
    return name if operand.axes == (0, 1, 2, 3) else aside.op("Transpose", name, perm=list(operand.axes))


def opaque(trace: Trace, name: str, why: str) -> Raised:
    """A value (B, heads, tokens, D) as it is."""
    batch, heads, _, dim = trace.shape(name)
    projection = Projection(
        head_of=tuple(range(heads)), opaque=name, opaque_heads=heads, opaque_dim=dim, opaque_why=why
    )
    return Raised(projection, 1.0, batch)


def turned(raised: Raised, turn: Turn) -> Raised:
    """An operand that the operator turns after its projection."""
    projection = raised.projection
    if projection.opaque or projection.rotary is not None:
        raise Refused("rotary-in-operator", "the operator turns values that are no bare projections")
    rotary = Rotary(turn.cos, turn.sin, turn.size, turn.interleaved, 1, ("heads", "double"))
    return replace(raised, projection=replace(projection, rotary=rotary))


def _cached(trace: Trace, form: FusedForm, raised: Raised, names: tuple[str, str] | None) -> Raised:
    """An operand that the operator appends to a cache."""
    past, present = names or ("", "")
    if not past and not present:
        return raised
    projection = raised.projection
    if projection.opaque:
        if form.places:
            raise Refused("cache-in-operator", "the operator caches values that are no projections")
        joined = form.aside.op("Concat", *(name for name in (past, projection.opaque) if name), output=present, axis=2)
        return replace(raised, projection=replace(projection, opaque=joined))
    if raised.factor != 1.0:
        raise Refused("cache-in-operator", "cached values are scaled after their projection")
    return replace(raised, projection=replace(projection, past=past, present=present, places=form.places))


def packed_projections(trace: Trace, node: ir.Node) -> tuple[Raised, Raised, Raised]:
    """Queries, keys and values of com.microsoft Attention, whose one weight holds all three."""
    names = [*inputs_of(node), ""][:3]
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
