"""Frequency pairs of a rotary embedding: where they are in a head, and which the scores miss least.

Inside a head only whole pairs commute with the rotation, so pairs leave or stay, for queries and keys together.
Dropping a set D of them costs exactly ``sum over f, f' in D of E[f, f']`` in squared centred scores (full attention),
where ``E[f, f']`` sums, over sequences, the product of Gram blocks f, f' of queries and of keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rewriter.core.statistics import Array64

Index = NDArray[np.intp]


def pair_columns(size: int, interleaved: bool) -> Index:
    """The two columns of every pair in the `size` rotated dims, (pairs, 2)."""
    pairs = np.arange(size // 2)
    first = 2 * pairs if interleaved else pairs
    return np.stack([first, first + 1 if interleaved else first + size // 2], axis=1)


def kept_columns(pairs: Index, size: int, interleaved: bool) -> tuple[int, ...]:
    """The columns of these pairs in the order that keeps the layout: side by side, or first halves and then second."""
    columns = pair_columns(size, interleaved)[np.sort(pairs)]
    ordered = columns.reshape(-1) if interleaved else columns.T.reshape(-1)
    return tuple(int(column) for column in ordered)


def pair_errors(products_DD: Array64, size: int, interleaved: bool) -> Array64:
    """E (pairs, pairs) from the summed products of Grams (`AttentionStatistics.products_HDD`) of one key head."""
    columns = pair_columns(size, interleaved)
    blocks = products_DD[columns[:, None, :, None], columns[None, :, None, :]]
    return np.asarray(blocks.sum(axis=(2, 3)))


def dropping_order(errors: Array64) -> tuple[Index, Array64]:
    """Backward greedy: which pair leaves next, and what all that left cost together so far."""
    order: list[int] = []
    costs: list[float] = []
    total, own = 0.0, np.diagonal(errors).copy()
    left = np.ones(len(errors), bool)
    for _ in range(len(errors)):
        one = int(np.argmin(np.where(left, own, np.inf)))
        total += float(own[one])
        order.append(one)
        costs.append(total)
        left[one] = False
        own += 2.0 * errors[one]
    return np.array(order, np.intp), np.array(costs)
