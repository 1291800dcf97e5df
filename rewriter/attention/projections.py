"""From an operand back to its projection: weights per head, bias, norm, rotation, cache.

A path is understood when it is a view times one constant, or such a view followed by a norm over heads, a rotation, or
both. Anything else stays an opaque operand: the graph's own value, used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rewriter.attention.linears import Linear, comes_from_inputs, linears_before, read_linear
from rewriter.attention.norms import find_norm
from rewriter.attention.operands import Operand, slots
from rewriter.attention.recipes import stored
from rewriter.attention.rotary import Turned, find_turn
from rewriter.attention.trace import VIEWS, Trace, close, inputs_of, outputs_of
from rewriter.attention.views import HeadLayout, View, head_layout, view_between
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, HeadNorm, Projection, Step


@dataclass(frozen=True)
class Raised:
    """A projection, the factor its path multiplies by, its batch size, and the linear node (None if opaque).

    `steps` make an opaque value that the graph does not hold.
    """

    projection: Projection
    factor: float
    batch: int
    linear: Linear | None = None
    steps: tuple[Step, ...] = ()


def raise_operand(trace: Trace, operand: Operand) -> Raised:
    """What is known of an operand; raises `Refused` only if it cannot even be kept as an opaque value."""
    try:
        return _raise_cached(trace, operand) or _raise_mapped(trace, operand)
    except Refused as problem:
        if not (operand.straight or operand.transposed):
            raise
        shape = trace.shape(operand.name)
        heads, dim = shape[1], shape[2 if operand.transposed else 3]
        read = tuple(range(heads)) if heads > 1 else (0,) * operand.lead[1]
        projection = Projection(
            head_of=read,
            opaque=operand.name,
            opaque_transposed=operand.transposed,
            opaque_heads=heads,
            opaque_dim=dim,
            opaque_why=problem.refusal.why,
        )
        return Raised(projection, 1.0, shape[0])


def _raise_cached(trace: Trace, operand: Operand) -> Raised | None:
    """operand = factor * present[:, head_of], where present is a cache output: past then fresh, or fresh alone."""
    for past, fresh, present in _caches(trace, operand.name):
        shape = trace.shape(present)
        turned = find_turn(trace, present, operand, shape[0])
        if turned is None or turned.rotary:
            continue
        inner = _raise_mapped(trace, Operand(fresh, (0, 1, 2, 3), trace.shape(fresh)[:2]))
        if inner.projection.head_of != tuple(range(shape[1])):
            raise Refused("cache-heads", "heads are repeated before the cache")
        factor = turned.factor
        if inner.factor != 1.0 and inner.linear:
            # the cache holds the scaled values, so the weights must make them
            inner = replace(inner, projection=_scaled(inner.linear, inner.projection, inner.factor), factor=1.0)
        projection = replace(inner.projection, past=past, present=present, head_of=turned.head_of)
        return replace(inner, projection=projection, factor=factor)
    return None


def _caches(trace: Trace, operand: str) -> list[tuple[str, str, str]]:
    """(past, fresh, present) candidates met walking back from an operand; past is "" for outputs without one."""
    found, stack, seen = [], [operand], set()
    while stack:
        name = stack.pop()
        node = trace.producer.get(name)
        if node is None or name in seen or trace.linear(node) or trace.bilinear(node) or not trace.floating(name):
            continue
        seen.add(name)
        shape = trace.shape(name)
        if node.op_type == "Concat" and len(shape) == 4 and len(node.inputs) == 2:
            past, fresh = inputs_of(node)
            axis = node.attributes["axis"].as_int() % 4
            if axis == 2 and past not in trace.fixed and comes_from_inputs(trace, past):
                found.append((past, fresh, name))
                continue
        elif len(shape) == 4 and _is_output(trace, name):
            found.append(("", name, name))
        if node.op_type in VIEWS | {"Mul", "Div", "Add", "Sub", "Neg"}:
            stack += trace.data_inputs(node)[:2]
    return found


def _is_output(trace: Trace, name: str) -> bool:
    copies = [o for node in trace.consumers[name] if node.op_type in ("Identity", "Cast") for o in outputs_of(node)]
    return name in trace.outputs or any(copy in trace.outputs for copy in copies)


def _scaled(linear: Linear, projection: Projection, factor: float) -> Projection:
    if projection.norm is not None:
        bias = projection.norm.bias_D
        norm = replace(
            projection.norm,
            gain_D=np.float64(factor) * projection.norm.gain_D,
            bias_D=None if bias is None else np.float64(factor) * bias,
        )
        return replace(projection, norm=norm)
    assert projection.weight_CGD is not None
    bias_GD = projection.bias_GD
    return replace(
        projection,
        weight_CGD=linear.scaled(projection.weight_CGD, factor),
        bias_GD=None if bias_GD is None else stored(np.float64(factor) * bias_GD, bias_GD.dtype),
    )


def _raise_mapped(trace: Trace, operand: Operand) -> Raised:
    why = Refused("no-projection", "no linear node before the operand")
    for node in linears_before(trace, operand.name):
        try:
            return _explain(trace, read_linear(trace, node), operand)
        except Refused as problem:
            why = problem
    raise why


def _explain(trace: Trace, linear: Linear, operand: Operand) -> Raised:
    whole = view_between(trace, linear.result, operand.name)
    if whole is None:
        try:
            return _explain_turned(trace, linear, operand)
        except Refused:
            across = _explain_across(trace, linear, operand)
            if across is None:
                raise
            return across
    return _explain_view(trace, linear, operand, whole)


def _explain_view(trace: Trace, linear: Linear, operand: Operand, whole: View) -> Raised:
    element, offset = operand.arrange(linear.channels_last(whole.element)), operand.arrange(whole.offset)
    layout = head_layout(element, linear.weight_CN.shape[1], linear.rows)
    projection = _projection(linear, layout, offset / whole.factor)
    batch = linear.rows[1] if layout.time_first else linear.rows[0]
    return Raised(projection, whole.factor, batch, linear)


def _projection(
    linear: Linear, layout: HeadLayout, offset: Array, head_of: tuple[int, ...] | None = None
) -> Projection:
    """Weights in head order; `offset` is what the path adds to the linear's result, per slot, token and dim."""
    batch = linear.rows[1] if layout.time_first else linear.rows[0]
    added = offset.reshape(batch, -1, *offset.shape[-2:])
    if not close(added, np.broadcast_to(added[:1, :, :1], added.shape)):
        raise Refused("offset-per-token", "what is added to the projection differs between tokens")
    read = layout.head_of if head_of is None else head_of
    # a packed projection holds heads of other operands too
    used = sorted(set(read))
    order_GD = layout.order_GD[used]
    bias_GD = added[0, [layout.head_of.index(g) for g in used], 0]
    if linear.bias_N is not None:
        bias_GD = bias_GD + linear.bias_N[order_GD]
    return Projection(
        source=linear.source,
        weight_CGD=linear.columns(order_GD),
        bias_GD=stored(bias_GD, linear.dtype) if bias_GD.any() else None,
        weight_name=linear.weight_name,
        bias_name=linear.bias_name,
        time_first=layout.time_first,
        flatten=linear.rank > 3 and not linear.channels_first,
        channels_first=linear.channels_first,
        head_of=tuple(used.index(g) for g in read),
    )


def _explain_turned(trace: Trace, linear: Linear, operand: Operand) -> Raised:
    """A view, then a norm over each head, a rotation, or both. The latest value that still is a view is the start."""
    chain = trace.dominators(linear.result, operand.name)
    views: list[tuple[int, View]] = []
    for position, name in enumerate(chain[:-1]):
        view = view_between(trace, linear.result, name)
        if view is None:
            break
        if len(trace.shape(name)) == 4:
            views.append((position, view))
    for position, view in reversed(views):
        for axes in ((0, 1, 2, 3), (0, 2, 1, 3)):
            try:
                layout = head_layout(
                    linear.channels_last(view.element).transpose(axes), linear.weight_CN.shape[1], linear.rows
                )
            except Refused:
                continue
            if layout.head_of != tuple(range(len(layout.order_GD))):
                continue
            found = _turn_after(trace, chain[position:], axes, operand, view.offset.shape[0])
            if found:
                norm, turned = found
                return _turned(linear, layout, view, axes, norm, turned)
    raise Refused("unknown-path", "neither a view of a linear nor a norm or rotation of one")


def _explain_across(trace: Trace, linear: Linear, operand: Operand) -> Raised | None:
    """A norm over the whole width of the projection, then a view or a rotation of heads (OLMo 2)."""
    chain = trace.dominators(linear.result, operand.name)
    shape, width = trace.shape(linear.result), linear.weight_CN.shape[1]
    if linear.channels_first or shape[-1] != width:
        return None
    start, norm, behind = linear.result, None, ""
    for name in chain[:-1]:
        view = view_between(trace, linear.result, name) if trace.shape(name) == shape else None
        if view is not None and np.array_equal(view.element.reshape(-1), np.arange(view.element.size)):
            start = name
            continue
        found = find_norm(trace, start, name)
        norm, behind = (found, name) if found else (norm, behind)
    before = view_between(trace, linear.result, start)
    if norm is None or before is None:
        return None
    # channel numbers in place of weights: what is read off is the order of channels in heads
    numbers = replace(linear, result=behind, weight_CN=np.arange(float(width))[None], bias_N=None, ledger=None)
    rest = view_between(trace, behind, operand.name)
    inner = _explain_turned(trace, numbers, operand) if rest is None else _explain_view(trace, numbers, operand, rest)
    order = inner.projection.weight_CGD
    if order is None or inner.projection.bias_GD is not None or inner.projection.norm is not None:
        return None
    order_GD = order[0].astype(np.int64)
    if sorted(order_GD.reshape(-1)) != list(range(width)):
        return None
    return _normed_across(linear, inner, norm, order_GD, before)


def _normed_across(linear: Linear, inner: Raised, norm: HeadNorm, order_GD: Array, before: View) -> Raised:
    rows = before.offset.reshape(-1, before.offset.shape[-1])
    if not close(rows, np.broadcast_to(rows[:1], rows.shape)):
        raise Refused("offset-per-token", "what is added to the projection differs between tokens")
    bias_N = rows[0] if linear.bias_N is None else rows[0] + linear.bias_N * before.factor
    bias_D = None if norm.bias_D is None else stored(norm.bias_D[order_GD], linear.dtype)
    whole = HeadNorm(norm.kind, stored(norm.gain_D[order_GD], linear.dtype), bias_D, norm.epsilon, across_heads=True)
    projection = replace(
        inner.projection,
        weight_CGD=linear.columns(order_GD, before.factor),
        bias_GD=stored(bias_N[order_GD], linear.dtype) if bias_N.any() else None,
        norm=whole,
    )
    return Raised(projection, inner.factor, inner.batch, linear)


def scaled_per_head(raised: Raised, factors: tuple[float, ...]) -> Raised:
    """The queries with a factor of their own for every head; raises `Refused` where weights cannot take it."""
    projection, linear = raised.projection, raised.linear
    plain = linear is not None and projection.head_of == tuple(range(len(factors)))
    across = projection.norm is not None and projection.norm.across_heads
    if not plain or across or linear is None or projection.weight_CGD is None:
        raise Refused("scale-per-head", "heads are scaled differently, and their weights cannot take the factors")
    factors_H1, bias_GD, norm = np.array(factors)[:, None], projection.bias_GD, projection.norm
    if norm is not None:
        bias_D = None if norm.bias_D is None else stored(factors_H1 * norm.bias_D, linear.dtype)
        norm = replace(norm, gain_D=stored(factors_H1 * norm.gain_D, linear.dtype), bias_D=bias_D)
        return replace(raised, projection=replace(projection, norm=norm))
    weight_CGD = linear.scaled(projection.weight_CGD, factors_H1)
    bias_GD = None if bias_GD is None else stored(factors_H1 * bias_GD, bias_GD.dtype)
    return replace(raised, projection=replace(projection, weight_CGD=weight_CGD, bias_GD=bias_GD))


def _turned(
    linear: Linear, layout: HeadLayout, view: View, axes: tuple[int, ...], norm: HeadNorm | None, turned: Turned
) -> Raised:
    batch = view.offset.shape[0]
    projection = _projection(linear, layout, view.offset.transpose(axes) / view.factor, turned.head_of)
    factor = turned.factor * view.factor
    if norm is not None:
        # a norm is not linear: what scales its input stays in the weights
        projection = _scaled(linear, projection, view.factor) if view.factor != 1.0 else projection
        norm = norm.keep_heads(sorted(set(turned.head_of)))
        bias_D = None if norm.bias_D is None else stored(norm.bias_D, linear.dtype)
        norm = replace(norm, gain_D=stored(norm.gain_D, linear.dtype), bias_D=bias_D)
        factor = turned.factor
    return Raised(replace(projection, norm=norm, rotary=turned.rotary), factor, batch, linear)


def _turn_after(
    trace: Trace, chain: list[str], axes: tuple[int, ...], operand: Operand, batch: int
) -> tuple[HeadNorm | None, Turned] | None:
    start, later = chain[0], chain[1:]
    norm, behind = None, start
    for name in later:  # the last value that still is the norm: gains and biases come after
        found = find_norm(trace, start, name, axes.index(1))
        norm, behind = (found, name) if found else (norm, behind)
    wanted = trace.value(behind).transpose(axes)
    for name in chain[chain.index(behind) :]:
        for order in (axes, (0, 1, 2, 3)) if len(trace.shape(name)) == 4 else ():
            if np.array_equal(trace.value(name).transpose(order), wanted):
                turned = find_turn(trace, name, operand, batch, order)
                if turned and (norm or turned.rotary):
                    return norm, turned
    return None if norm else _norm_after_turn(trace, chain, axes, operand, batch)


def _norm_after_turn(
    trace: Trace, chain: list[str], axes: tuple[int, ...], operand: Operand, batch: int
) -> tuple[HeadNorm, Turned] | None:
    """A rotation first, then a norm of the turned heads (HunYuan)."""
    straight = (0, 1, 2, 3)
    for place, name in enumerate(chain[1:], 1):
        shape = trace.shape(name)
        target = Operand(name, straight, shape[:2])
        turned = find_turn(trace, chain[0], target, batch, axes) if len(shape) == 4 else None
        if turned is None or turned.rotary is None or abs(turned.factor - 1.0) > 1e-12:
            continue
        for later in reversed(chain[place + 1 :]):
            norm = find_norm(trace, name, later, 1)
            rest = find_turn(trace, later, operand, batch) if norm else None
            if norm and rest and rest.rotary is None and turned.head_of == tuple(range(shape[1])):
                return replace(norm, after_rotation=True), replace(rest, rotary=turned.rotary)
    return None


def operand_slots(trace: Trace, operand: Operand, batch: int) -> Array:
    """The recorded operand as (batch, heads, tokens, dim)."""
    return slots(operand, trace.value(operand.name), batch)
