"""Masks that attention operators make of lengths, starts, windows and raw masks, written out as steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.attention.asides import Aside
from rewriter.attention.trace import Trace
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, ScoreBias


def count(aside: Aside, length: str) -> str:
    """0, 1, ... below a length."""
    return aside.op("Range", aside.whole(0), length, aside.whole(1))


def column(aside: Aside, name: str) -> str:
    """A vector as (B, 1) of int64."""
    return aside.op("Reshape", aside.op("Cast", name, to=7), aside.ints(-1, 1))


def both(aside: Aside, *conditions: str) -> str:
    """All of them that are given."""
    first, *others = [condition for condition in conditions if condition]
    for other in others:
        first = aside.op("And", first, other)
    return first


def within(aside: Aside, ends: str, starts: str, keys: str) -> str:
    """(B, T): whether a key lies before its row's end, and not before its start."""
    steps = count(aside, keys)
    before = aside.op("Less", steps, column(aside, ends))
    if not starts:
        return before
    return both(aside, before, aside.op("Not", aside.op("Less", steps, column(aside, starts))))


def reachable(aside: Aside, at: str, keys: str, causal: bool, left: int, right: int) -> str:
    """(..., S, T) for places (..., S, 1) of queries: keys not later if causal, and within a window where it is set."""
    steps, conditions = count(aside, keys), []
    if causal:
        conditions.append(aside.op("Not", aside.op("Less", at, steps)))
    if left >= 0:
        conditions.append(aside.op("Not", aside.op("Less", steps, aside.op("Sub", at, aside.whole(left)))))
    if right >= 0:
        conditions.append(aside.op("Not", aside.op("Less", aside.op("Add", at, aside.whole(right)), steps)))
    return both(aside, *conditions)


def limited(trace: Trace, aside: Aside, mask: str, allowed: str) -> ScoreBias:
    """A mask of the graph (may be missing), and what is allowed besides."""
    if not mask:
        return value_bias(trace, allowed)
    if trace.value(mask).dtype == np.bool_:
        return value_bias(trace, both(aside, mask, allowed))
    return value_bias(trace, aside.op("Where", allowed, mask, aside.number(-np.inf)))


def value_bias(trace: Trace, name: str) -> ScoreBias:
    """What is added to the scores as one value of the graph, boolean or not."""
    if not name:
        return ScoreBias()
    value = trace.value(name)
    axis = value.shape[-3] if value.ndim > 2 else 1
    return ScoreBias(kind="bool" if value.dtype == np.bool_ else "value", value=name, heads_axis=axis)


def padding_of(trace: Trace, aside: Aside, mask: str, batch: int, keys: str) -> str:
    """(B, T), not zero where a key is valid: a mask of that form, or ends (B,), or ends and starts (2B,)."""
    shape = trace.shape(mask)
    if len(shape) == 2 and shape[1] > 1:
        return mask
    if shape in ((batch,), (batch, 1)):
        return within(aside, mask, "", keys)
    if shape == (2 * batch,):
        halves = aside.op("Reshape", mask, aside.ints(2, -1))
        ends, starts = (aside.op("Gather", halves, aside.whole(i), axis=0) for i in (0, 1))
        return within(aside, ends, starts, keys)
    raise Refused("mask-form", f"a mask of shape {shape} for a batch of {batch}")


def raw_mask(trace: Trace, aside: Aside, mask: str, fill: float, queries: str, keys: str) -> str:
    """What a mask (B, S, T), or (B, 1, M, M) whose last queries count, adds to the scores."""
    shown = aside.op("Cast", mask, to=9)
    if len(trace.shape(mask)) == 3:
        shown = aside.unsqueeze(shown, 1)
    else:
        first = aside.op("Sub", keys, queries)
        ends = [aside.op("Reshape", name, aside.ints(1)) for name in (first, keys)]
        shown = aside.op("Slice", shown, ends[0], ends[1], aside.ints(2))
        shown = aside.op("Slice", shown, aside.ints(0), ends[1], aside.ints(3))
    return aside.op("Where", shown, aside.number(0.0), aside.number(fill))


def microsoft_bias(
    trace: Trace, aside: Aside, mask: str, added: str, fill: float, causal: bool, batch: int, sizes: tuple[str, str]
) -> ScoreBias:
    """The additive part of com.microsoft Attention and MultiHeadAttention; `sizes` name numbers of queries and keys."""
    padding = ""
    if mask and len(trace.shape(mask)) > 2:
        shown = raw_mask(trace, aside, mask, fill, *sizes)
        added = aside.op("Add", shown, added) if added else shown
    elif mask:
        padding = padding_of(trace, aside, mask, batch, sizes[1])
    bias = value_bias(trace, added)
    return replace(bias, also_causal="end" if causal else "", padding=padding, padding_fill=fill if padding else 0.0)


def offset_of(trace: Trace, bias: ScoreBias, queries: int, keys: int) -> Array:
    """The numbers that a bias adds to scores, (1 or B, 1 or H, S, T)."""
    numbers = np.zeros((1, 1, queries, keys))
    if bias.value:
        value = trace.value(bias.value)
        numbers = numbers + (np.where(value, 0.0, -np.inf) if bias.kind == "bool" else value)
    if bias.padding:
        numbers = numbers + np.where(trace.value(bias.padding) != 0, 0.0, bias.padding_fill)[:, None, None]
    if bias.also_causal:
        shift = keys - queries if bias.also_causal == "end" else 0
        numbers = numbers + np.where(np.tri(queries, keys, shift, dtype=bool), 0.0, -np.inf)
    return numbers
