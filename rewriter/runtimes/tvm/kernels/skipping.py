"""Blocks of keys that a mask hides from a whole group of queries are not computed: causal masks, windows, padding.

Whether a block is hidden is read from the mask itself at run time, so that masks that depend on data are served too and
a wrong claim about a mask cannot make a result wrong. A block is passed over where every number of it is -inf (or
False), or where all are beyond any score and every query has already seen a key that is not: its exponentials are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.emit import Expression, Index, loop, splat, store, vec

if TYPE_CHECKING:
    from rewriter.runtimes.tvm.kernels.flash import FlashWriter

LOWEST = float(np.finfo(np.float32).min)
BEYOND_SCORES, SEEN = -1e30, -1e29  # masks of -1e4 or -1e9 are ordinary numbers and are added
PASSED_OVER, LEAST_TOP = 0, 1  # rows of the writer's `hidden`


def can_skip(writer: FlashWriter) -> bool:
    """Several blocks, and a mask that differs between keys."""
    bias = writer.a.bias
    return writer.blocks > 1 and bias is not None and bias.shape[3] > 1


def is_seen(writer: FlashWriter, first: Index, count: int, key: Index, keys: int) -> Expression:
    """Emits the look at one block of the mask; the condition under which the block must be computed."""
    lanes, all_lanes, hidden = writer.lanes, vec(0, writer.lanes), writer.hidden
    store(hidden, splat(-T.infinity("float32"), lanes), PASSED_OVER, all_lanes)
    store(hidden, splat(T.infinity("float32"), lanes), LEAST_TOP, all_lanes)
    full, left = emit.split(keys, lanes)
    with loop(count if writer.a.bias is not None and writer.a.bias.shape[2] > 1 else 1) as row:
        if full:
            with loop(full) as part:
                _raise(writer, first + row, key + part * lanes, lanes)
        if left:
            _raise(writer, first + row, key + full * lanes, left)
    with loop(count) as row:
        store(hidden, T.min(hidden[LEAST_TOP, all_lanes], writer.top[row, all_lanes]), LEAST_TOP, all_lanes)
    vectors.reduce_lanes(hidden, PASSED_OVER, vectors.maximum, lanes)
    most, least = hidden[PASSED_OVER, 0], hidden[LEAST_TOP, 0]
    # NaN in the mask compares false with everything: such a block is computed.
    beyond = T.And(most <= T.float32(BEYOND_SCORES), least >= T.float32(SEEN))
    return T.Not(T.Or(most < T.float32(LOWEST), beyond))


def _raise(writer: FlashWriter, query: Index, key: Index, inside: int) -> None:
    lanes, all_lanes = writer.lanes, vec(0, writer.lanes)
    low = splat(-T.infinity("float32"), lanes)
    value = writer.bias_vector(query, key, inside)
    if writer.a.bias is not None and writer.a.bias.kind == "bool":
        value = T.Select(value, splat(0.0, lanes), low)
    if inside < lanes:
        value = T.Select(T.Ramp(T.int32(0), 1, lanes) < T.Broadcast(T.int32(inside), lanes), value, low)
    store(writer.hidden, T.max(writer.hidden[PASSED_OVER, all_lanes], value), PASSED_OVER, all_lanes)
