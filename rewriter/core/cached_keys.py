"""What the keys of several heads are made of, best first: the parts that a smaller cache keeps.

Parts are principal components of the keys side by side, scaled by what queries make of them (the pooled surrogate of
`merging`). A part of dims that do not turn is one number per token. Under a rotary embedding a part is a pair of one
frequency: one complex number per head and frequency commutes with the rotation, so heads may share a pair of their own
frequency and no other. A query meets a part through the map of the head that it read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewriter.core.linalg import cholesky_upper
from rewriter.core.pairs import pair_columns
from rewriter.core.statistics import Array64

Complex = NDArray[np.complex128]

_RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class KeyParts:
    """Of M heads with D dims each: P pairs with their frequencies, and N parts that do not turn, each best first.

    `gain` is the share of the squared scores that a part carries, in the units of the Grams it was made from.
    """

    pair_gain: Array64
    frequency: NDArray[np.intp]
    pair_query_MP: Complex
    pair_key_MP: Complex
    rest_gain: Array64
    rest_query_MDN: Array64
    rest_key_MDN: Array64

    @property
    def total(self) -> float:
        """All gains."""
        return float(self.pair_gain.sum() + self.rest_gain.sum())

    def lost(self, pairs: int, rest: int) -> float:
        """The gains of what is left out when the best `pairs` and the best `rest` stay."""
        return float(self.pair_gain[pairs:].sum() + self.rest_gain[rest:].sum())


def key_parts(query_MDD: Array64, joint_key: Array64, rotated: int = 0, interleaved: bool = False) -> KeyParts:
    """`query_MDD` are Grams of the queries that read each head, `joint_key` (M*D, M*D) is that of the centred keys."""
    members, dim = query_MDD.shape[:2]
    blocks = joint_key.reshape(members, dim, members, dim)
    pairs = [_turning(query_MDD, blocks, int(a), int(b)) for a, b in pair_columns(rotated, interleaved)]
    own = slice(rotated, dim)
    rest = _still(query_MDD[:, own, own], blocks[:, own, :, own])
    if not pairs:
        none = np.zeros((members, 0), np.complex128)
        return KeyParts(np.zeros(0), np.zeros(0, np.intp), none, none, *rest)
    gain = np.concatenate([one[0] for one in pairs])
    order = np.argsort(-gain, kind="stable")
    frequency = np.repeat(np.arange(len(pairs)), members)[order]
    query, key = (np.concatenate([one[side] for one in pairs], axis=1)[:, order] for side in (1, 2))
    return KeyParts(gain[order], frequency, query, key, *rest)


def split_of(parts: Sequence[KeyParts], rank: int) -> tuple[int, int] | None:
    """How many pairs and how many other parts stay, the same for all, so that least is lost; None if nothing fits."""
    pairs, rest = (min(len(gain) for gain in gains) for gains in _gains(parts))
    fitting = [(p, rank - 2 * p) for p in range(pairs + 1) if 0 <= rank - 2 * p <= rest]
    return min(fitting, key=lambda split: sum(one.lost(*split) for one in parts), default=None)


def key_maps(
    parts: KeyParts, pairs: int, rest: int, rotated: int, interleaved: bool
) -> tuple[Array64, Array64, tuple[int, ...]]:
    """Maps of queries and of keys, (M, D, R), to the best parts, and the columns of the rotary tables they turn by.

    Turning dims come first, in the layout that `interleaved` says.
    """
    members, others = parts.rest_query_MDN.shape[:2]
    chosen = np.argsort(parts.frequency[:pairs], kind="stable")
    columns = pair_columns(rotated, interleaved)[parts.frequency[chosen]].reshape(-1, 2)
    places = pair_columns(2 * pairs, interleaved)
    made = []
    for pair_MP, rest_MDN in (
        (parts.pair_query_MP, parts.rest_query_MDN),
        (parts.pair_key_MP, parts.rest_key_MDN),
    ):
        whole = np.zeros((members, rotated + others, 2 * pairs + rest))
        whole[:, rotated:, 2 * pairs :] = rest_MDN[:, :, :rest]
        for (first, second), (one, two), factor_M in zip(columns, places, pair_MP[:, chosen].T, strict=True):
            whole[:, first, one] = whole[:, second, two] = factor_M.real
            whole[:, second, one], whole[:, first, two] = -factor_M.imag, factor_M.imag
        made.append(whole)
    table = np.zeros(2 * pairs, np.intp)
    table[places.reshape(-1)] = columns.reshape(-1)
    return made[0], made[1], tuple(int(column) for column in table)


def _gains(parts: Sequence[KeyParts]) -> tuple[list[Array64], list[Array64]]:
    return [one.pair_gain for one in parts], [one.rest_gain for one in parts]


def _still(query_MDD: Array64, blocks_MDMD: Array64) -> tuple[Array64, Array64, Array64]:
    """Gains and maps of the dims that do not turn."""
    members, dim = query_MDD.shape[:2]
    if not dim:
        return np.zeros(0), np.zeros((members, 0, 0)), np.zeros((members, 0, 0))
    roots = np.stack([_root(gram) for gram in query_MDD])
    scaled = np.einsum("mab,mbnc,ndc->mand", roots, blocks_MDMD, roots).reshape(members * dim, -1)
    values, vectors = np.linalg.eigh((scaled + scaled.T) / 2.0)
    top = vectors[:, ::-1].reshape(members, dim, -1)
    key = np.einsum("mab,mac->mbc", roots, top)
    query = np.stack([np.linalg.solve(root, own) for root, own in zip(roots, top, strict=True)])
    scale = np.sqrt(np.sqrt(np.mean(key**2) / max(float(np.mean(query**2)), 1e-300))) or 1.0
    return np.maximum(values[::-1], 0.0), query * scale, key / scale


def _root(gram: Array64) -> Array64:
    return cholesky_upper(gram, _RIDGE) if np.trace(gram) > 0.0 else np.eye(len(gram)) * 1e-6


def _turning(query_MDD: Array64, blocks: Array64, first: int, second: int) -> tuple[Array64, Complex, Complex]:
    """Gains and complex maps (M, M) of one frequency."""
    strength = np.sqrt(query_MDD[:, first, first] + query_MDD[:, second, second])
    strength = np.maximum(strength, 1e-6 * max(float(strength.max()), 1e-12))
    real = blocks[:, first, :, first] + blocks[:, second, :, second]
    turned = blocks[:, second, :, first] - blocks[:, first, :, second]
    hermitian = (real + 1j * turned) * np.outer(strength, strength)
    values, vectors = np.linalg.eigh((hermitian + hermitian.conj().T) / 2.0)
    top: Complex = vectors[:, ::-1].conj()
    mean = float(np.sqrt(np.mean(strength**2)))
    # half, because queries of one frequency are taken to point anywhere: each of their two dims carries half
    gains = np.maximum(values[::-1], 0.0) / 2.0
    query: Complex = top * (mean / strength)[:, None]
    key: Complex = top * (strength / mean)[:, None]
    return gains, query, key
