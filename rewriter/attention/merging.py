"""Operands and biases of several heads as those of one attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewriter.attention.asides import Aside
from rewriter.attention.projections import Raised, scaled_per_head
from rewriter.attention.recipes import Joined, stored
from rewriter.attention.trace import Trace, inputs_of, outputs_of
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, HeadNorm, Projection, ScoreBias, Step


def merged_operand(trace: Trace, parts: Sequence[Raised], scales: Sequence[float] = ()) -> Raised:
    """One operand with the heads of all parts, each times its scale; heads that are the same are one.

    Raises `Refused` if the parts are not projections of the same value.
    """
    factors = [part.factor for part in parts]
    if not np.allclose(factors, factors[0], rtol=1e-12, atol=0) and not scales:
        raise Refused("loop-of-heads", "heads with different factors")
    if all(part.projection.opaque for part in parts):
        return _joined_values(trace, parts, scales)
    if any(abs(scale - 1.0) > 1e-12 for scale in scales):
        heads = [len(part.projection.head_of) for part in parts]
        parts = [scaled_per_head(p, (s,) * n) for p, s, n in zip(parts, scales, heads, strict=True)]
    first = parts[0].projection
    if not all(_fits(first, part.projection) for part in parts):
        raise Refused("loop-of-heads", "heads that are no projections of one value")
    chosen, head_of = _distinct(parts)
    projections = [part.projection for part in chosen]
    names = [" ".join(dict.fromkeys(n for n in (getattr(p, f) for p in projections) if n)) for f in _NAMES]
    merged = replace(
        first,
        weight_CGD=_joined_weight(chosen),
        bias_GD=_joined_bias(chosen),
        weight_name=names[0],
        bias_name=names[1],
        head_of=head_of,
    )
    return replace(parts[0], projection=merged)


def _joined_values(trace: Trace, parts: Sequence[Raised], scales: Sequence[float]) -> Raised:
    """Operands kept as values, one after the other in the axis of heads."""
    projections = [part.projection for part in parts]
    if len({(p.opaque_dim, p.opaque_transposed) for p in projections}) > 1:
        raise Refused("loop-of-heads", "heads of different sizes")
    aside = Aside(trace)
    names = [projection.opaque for projection in projections]
    for place, scale in enumerate(scales):
        if abs(scale - 1.0) > 1e-12:
            names[place] = aside.op("Mul", names[place], aside.number(scale))
    distinct = list(dict.fromkeys(names))
    starts = dict(zip(names, [0] * len(names), strict=True))
    total = 0
    for name in distinct:
        starts[name], total = total, total + projections[names.index(name)].opaque_heads
    if len({trace.value(name).shape[2:] for name in distinct}) > 1:
        raise Refused("loop-of-heads", "parts of different lengths")
    joined = aside.op("Concat", *distinct, axis=1) if len(distinct) > 1 else distinct[0]
    head_of = [starts[n] + head for n, p in zip(names, projections, strict=True) for head in p.head_of]
    projection = replace(projections[0], opaque=joined, opaque_heads=total, head_of=tuple(head_of))
    steps = (*(step for part in parts for step in part.steps), *aside.steps)
    return replace(parts[0], projection=projection, steps=steps)


_NAMES = ("weight_name", "bias_name")


def _fits(first: Projection, other: Projection) -> bool:
    """Whether two projections differ in nothing but their weights."""
    layout = ("source", "time_first", "flatten", "channels_first", "past", "present", "places", "rotary")
    same = all(getattr(first, name) == getattr(other, name) for name in layout)
    cached = bool(first.past or first.present)
    return same and not cached and first.mapped and other.mapped and _same_norm(first.norm, other.norm)


def _same_norm(one: HeadNorm | None, two: HeadNorm | None) -> bool:
    if one is None or two is None:
        return one is two
    if one.gain_D.ndim != 1 or not _same_array(one.gain_D, two.gain_D) or not _same_array(one.bias_D, two.bias_D):
        return False
    return (one.kind, one.epsilon, one.after_rotation) == (two.kind, two.epsilon, two.after_rotation)


def _same_array(one: Array | None, two: Array | None) -> bool:
    return one is two if one is None or two is None else np.array_equal(one, two)


def _distinct(parts: Sequence[Raised]) -> tuple[list[Raised], tuple[int, ...]]:
    """The parts that differ, and which of their heads each head of all parts reads."""
    chosen: list[Raised] = []
    starts: list[int] = []
    head_of: list[int] = []
    for part in parts:
        known = next((i for i, other in enumerate(chosen) if _equal(part, other)), None)
        if known is None:
            starts.append(sum(p.projection.heads for p in chosen))
            chosen.append(part)
            known = len(chosen) - 1
        head_of += [starts[known] + head for head in part.projection.head_of]
    return chosen, tuple(head_of)


def _equal(one: Raised, two: Raised) -> bool:
    if one.linear is None or two.linear is None or one.linear.result != two.linear.result:
        return False
    p, q = one.projection, two.projection
    return _same_array(p.weight_CGD, q.weight_CGD) and _same_array(p.bias_GD, q.bias_GD)


def _joined_weight(parts: Sequence[Raised]) -> Array:
    weights = [part.projection.weight_CGD for part in parts]
    known = [weight for weight in weights if weight is not None]
    if len(known) == 1:
        return known[0]
    if len({weight.shape[::2] for weight in known}) > 1:
        raise Refused("loop-of-heads", "heads of different sizes")
    whole = np.concatenate(known, axis=1)
    dtype = next(part.linear.dtype for part in parts if part.linear)
    ledger = next((part.linear.ledger for part in parts if part.linear and part.linear.ledger is not None), None)
    if ledger is not None:
        recipes = tuple(ledger[id(weight)][1] if id(weight) in ledger else weight for weight in known)
        ledger[id(whole)] = whole, Joined.of(recipes, 1, dtype)
    return whole


def _joined_bias(parts: Sequence[Raised]) -> Array | None:
    biases = [part.projection.bias_GD for part in parts]
    if all(bias is None for bias in biases):
        return None
    shapes = [(part.projection.heads, part.projection.dim) for part in parts]
    filled = [np.zeros(shape) if bias is None else bias for bias, shape in zip(biases, shapes, strict=True)]
    dtype = next(bias.dtype for bias in biases if bias is not None)
    return stored(np.concatenate([bias.astype(np.float64) for bias in filled]), dtype)


def merged_bias(trace: Trace, parts: Sequence[ScoreBias], heads: Sequence[int]) -> tuple[ScoreBias, tuple[Step, ...]]:
    """What is added to the scores of all heads, and the steps that make it; raises `Refused` if it cannot be joined."""
    first = parts[0]
    alike = all(_signature(trace, part) == _signature(trace, first) for part in parts)
    if alike and (max(heads) == 1 or (first.heads_axis == 1 and not first.folded and not first.full_shape)):
        return first, ()
    if any(part.kind != "value" for part in parts):
        raise Refused("loop-of-heads", "what is added to the scores differs from head to head")
    aside = Aside(trace)
    rows = [row for part, count in zip(parts, heads, strict=True) for row in _rows(trace, aside, part, count)]
    if len({(*shape[:1], *shape[2:]) for shape in map(trace.shape, rows)}) > 1:
        raise Refused("loop-of-heads", "what is added to the scores differs in shape from head to head")
    return ScoreBias("value", aside.op("Concat", *rows, axis=1), heads_axis=sum(heads)), tuple(aside.steps)


def _rows(trace: Trace, aside: Aside, bias: ScoreBias, heads: int) -> list[str]:
    """What is added to the scores of some heads, in four axes: once for all of its heads, or once for each."""
    rank = len(trace.shape(bias.value))
    if rank > 4 or (rank == 3 and not bias.folded and heads > 1) or (bias.folded and bias.heads_axis > 1):
        raise Refused("loop-of-heads", "what is added to the scores has another layout")
    new = {4: (), 3: (1,) if bias.folded else (0,), 2: (0, 1), 1: (0, 1, 2)}.get(rank, ())
    name = aside.unsqueeze(bias.value, *new) if new else bias.value
    return [name] * (heads if trace.shape(name)[1] == 1 else 1)


def _signature(trace: Trace, bias: ScoreBias) -> object:
    """Equal for biases that are computed from the same values in the same way."""
    if bias.kind != "path":
        return bias
    inside: dict[str, str] = {bias.value: "product"}
    steps = []
    for node in trace.between(bias.value, bias.path_end) or []:
        reads = [inside.get(name, name) for name in inputs_of(node)]
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        steps.append((node.op_type, node.domain, tuple(reads), tuple(attributes)))
        inside.update((name, f"step {len(steps)} {i}") for i, name in enumerate(outputs_of(node)))
    return replace(bias, value="", path_end=""), tuple(steps)
