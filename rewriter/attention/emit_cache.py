"""How a cache enters an operand: as it is, or made from a cache of the model as it was."""

from __future__ import annotations

from rewriter.attention.build import Builder
from rewriter.core.operand import Projection


def read_past(b: Builder, projection: Projection) -> str:
    """The cached part of an operand, (B, G', T, D').

    On top of values of the model as it was (`Builder.old_caches`) what was cached has its sizes and is mapped to the
    new ones (`Projection.cache_map`); a graph whose signature was changed takes the new ones.
    """
    maps = projection.cache_map
    if maps is None or not b.old_caches:
        return projection.past
    heads, dim, new_heads, new_dim = maps.shape
    rows = b.op("Transpose", projection.past, perm=[0, 2, 1, 3])
    batch, tokens = b.size_of(projection.past, 0), b.size_of(projection.past, 2)
    flat = b.op("Reshape", rows, b.joined([batch, tokens, b.ints(heads * dim)]))
    made = b.op("MatMul", flat, b.constant(maps.reshape(heads * dim, new_heads * new_dim)))
    split = b.op("Reshape", made, b.joined([batch, tokens, b.ints(new_heads, new_dim)]))
    return b.op("Transpose", split, perm=[0, 2, 1, 3])
