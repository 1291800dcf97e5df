"""The code probe: which element of one value is each element of another, in four evaluations whatever the width.

The source is replaced by the numbers 1..N (exact in float64); what arrives names the element it came from. A path
passes only if it is a constant multiple of a view, so transposes, splits, gathers, repeats need no cases of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewriter.attention.trace import Trace, close
from rewriter.core.refusal import Refused
from rewriter.core.site import Array


@dataclass(frozen=True)
class View:
    """``target = offset + factor * source.flat[element]``; `element` and `offset` have the target's shape."""

    element: Array
    factor: float
    offset: Array


def view_between(trace: Trace, source: str, target: str) -> View | None:
    """How target is a view of source times one constant; None if it is anything else."""
    shape = trace.shape(source)
    size = int(np.prod(shape))
    if not trace.floating(source) or not trace.floating(target) or not size or not trace.value(target).size:
        return None
    random = np.random.default_rng(0).standard_normal(shape)
    codes = np.arange(1, size + 1, dtype=np.float64).reshape(shape)
    results = trace.probe(source, target, [np.zeros(shape), np.ones(shape), codes, random])
    if results is None:
        return None
    zero, one, coded, moved = results
    gain = one - zero
    factor = float(gain.flat[0])
    if not np.isfinite(gain).all() or factor == 0.0 or not close(gain, np.full_like(gain, factor)):
        return None
    element = (coded - zero) / factor - 1.0
    index = np.rint(element)
    if np.abs(element - index).max() > 1e-3 or index.min() < 0 or index.max() >= size:
        return None
    place = index.astype(np.int64)
    if not close(moved - zero, factor * random.reshape(-1)[place]):
        return None
    return View(place, factor, zero)


@dataclass(frozen=True)
class HeadLayout:
    """Which channels form which head: `order_GD` holds channel numbers, `head_of[slot]` the head a slot reads."""

    order_GD: Array
    head_of: tuple[int, ...]
    time_first: bool


def head_layout(element: Array, width: int, rows: tuple[int, int], folded_time: bool = True) -> HeadLayout:
    """Heads of an operand from where its elements come from.

    `element` is (slots..., tokens, dim) of indices into a value of `rows` x `width`, whose two row axes are batch and
    tokens, or tokens and batch. Raises `Refused` if slots mix batch items or tokens, or if heads share channels.
    """
    tokens, dim = element.shape[-2:]
    why = "rows of the projection do not become batch and tokens"
    for time_first in (False, True) if folded_time else (False,):
        batch, length = rows[::-1] if time_first else rows
        if length != tokens or element.size % (batch * tokens * dim):
            continue
        place = element.reshape(batch, -1, tokens, dim)
        b, t = np.arange(batch)[:, None, None, None], np.arange(tokens)[:, None]
        expected = t * batch + b if time_first else b * tokens + t
        if not np.array_equal(place // width, np.broadcast_to(expected, place.shape)):
            continue
        channel = place % width
        if not np.array_equal(channel, np.broadcast_to(channel[:1, :, :1], channel.shape)):
            why = "channels differ between tokens"
            continue
        order, head_of = _group(channel[0, :, 0])
        return HeadLayout(order, head_of, time_first)
    raise Refused("projection-layout", why)


def _group(channel_HD: Array) -> tuple[Array, tuple[int, ...]]:
    heads: dict[tuple[int, ...], int] = {}
    head_of = [heads.setdefault(tuple(row.tolist()), len(heads)) for row in channel_HD]
    order = np.array(list(heads), dtype=np.int64)
    if len(np.unique(order)) != order.size:
        raise Refused("heads-share-channels", "channels of different heads mix")
    return order, tuple(head_of)
