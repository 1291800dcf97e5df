"""The mask of a local window with sinks."""

from __future__ import annotations

import numpy as np

from rewriter.attention.build import Builder
from rewriter.core.site import ScoreBias


def near(b: Builder, bias: ScoreBias, queries: str, keys: str) -> str:
    """(1, 1, S, T), True where a key is less than the window away from the query, or a sink; lengths are values."""
    zero, one = b.constant(np.array(0, np.int64)), b.constant(np.array(1, np.int64))
    window, sinks = b.constant(np.array(bias.window, np.int64)), b.constant(np.array(bias.sinks, np.int64))
    rows, columns = (b.unsqueeze(b.op("Range", zero, n, one), axis) for n, axis in ((queries, 1), (keys, 0)))
    before, after = b.op("Add", columns, window), b.op("Add", rows, window)
    close = b.op("And", b.op("Less", rows, before), b.op("Less", columns, after))
    return b.unsqueeze(b.op("Or", close, b.op("Less", columns, sinks)), 0, 1)
