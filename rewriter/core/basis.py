"""Operands in another basis: each new head is a sum of old heads times their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewriter.core.operand import Array, Projection
from rewriter.core.statistics import Array64


def recombined(operand: Projection, maps_GDHE: Array64, head_of: Sequence[int]) -> Projection:
    """The operand with heads ``new[h] = sum over g of old[g] @ maps[g, :, h]``, of which query head i reads head_of[i].

    A cache is made of the same sums, and `Projection.cache_map` says so.
    """
    weight = operand.weight_CGD
    assert weight is not None
    bias = operand.bias_GD
    return replace(
        operand,
        weight_CGD=_summed(weight, maps_GDHE),
        bias_GD=None if bias is None else _summed(bias[None], maps_GDHE)[0],
        head_of=tuple(head_of),
        cache_map=_composed(operand, maps_GDHE),
    )


def apart(maps_GDE: Array64) -> Array64:
    """Maps that leave heads apart, (G, D, G, E), from one map per head."""
    count, dim, rank = maps_GDE.shape
    found = np.zeros((count, dim, count, rank))
    found[np.arange(count), :, np.arange(count)] = maps_GDE
    return found


def together(maps_GDE: Array64) -> Array64:
    """Maps to one head, (G, D, 1, E), from the share of every head."""
    return maps_GDE[:, :, None]


def _summed(rows_NGD: Array, maps_GDHE: Array64) -> Array:
    made = np.zeros((len(rows_NGD), *maps_GDHE.shape[2:]))
    for old, new in np.argwhere(maps_GDHE.any(axis=(1, 3))):
        made[:, new] += rows_NGD[:, old].astype(np.float64) @ maps_GDHE[old, :, new]
    return made.astype(rows_NGD.dtype)


def _composed(operand: Projection, maps_GDHE: Array64) -> Array | None:
    if not operand.past and not operand.present:
        return None
    if operand.cache_map is None:
        return maps_GDHE
    return np.asarray(np.tensordot(operand.cache_map, maps_GDHE, axes=2))
