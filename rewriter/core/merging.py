"""Merging key and value heads: what one shared head can do for several, by least squares on Gram matrices.

Keys of a group are the leading principal components of its keys, side by side and scaled by what queries make of them:
the optimum of the pooled surrogate, with no alignment loop. Under a rotary embedding only one complex number per head
and frequency commutes with the rotation, and the components are those of one Hermitian matrix per frequency. Values
are merged through what the probabilities of every head make of them, alternating between the shared head and its
readers (ridge-free least squares on ``AttentionStatistics.mixed_HKK``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from rewriter.core.linalg import cholesky_upper, solve_gram
from rewriter.core.pairs import pair_columns
from rewriter.core.statistics import Array64

_RIDGE = 1e-9
_SWEEPS, _STEPS = 4, 25


@dataclass(frozen=True, eq=False)
class Merged:
    """For each member of a group the maps (D, D) of its queries and of its keys, and the share of scores lost."""

    query_MDD: Array64
    key_MDD: Array64
    lost: float


def merge_keys(query_MDD: Array64, joint_key: Array64, rotated: int = 0, interleaved: bool = False) -> Merged:
    """Maps to one key head; `query_MDD` are Grams of the queries of each member, `joint_key` (M*D, M*D) of its keys.

    A shared key is the sum of members' keys times their maps; queries take theirs. The leading `rotated` dims are
    mapped by complex numbers.
    """
    members, dim = query_MDD.shape[:2]
    query, key = np.zeros((members, dim, dim)), np.zeros((members, dim, dim))
    blocks = joint_key.reshape(members, dim, members, dim)
    lost = total = 0.0
    if rotated < dim:
        own = slice(rotated, dim)
        query[:, own, own], key[:, own, own], parts = _principal(query_MDD[:, own, own], blocks[:, own, :, own])
        lost, total = lost + parts[0], total + parts[1]
    for first, second in pair_columns(rotated, interleaved):
        parts = _turned(query, key, query_MDD, blocks, int(first), int(second))
        lost, total = lost + parts[0], total + parts[1]
    return Merged(query, key, lost / max(total, 1e-300))


def _principal(query_MDD: Array64, blocks_MDMD: Array64) -> tuple[Array64, Array64, tuple[float, float]]:
    members, dim = query_MDD.shape[:2]
    roots = np.stack([_root(gram) for gram in query_MDD])
    scaled = np.einsum("mab,mbnc,ndc->mand", roots, blocks_MDMD, roots).reshape(members * dim, -1)
    values, vectors = linalg.eigh((scaled + scaled.T) / 2.0)
    top = vectors[:, ::-1][:, :dim].reshape(members, dim, dim)
    key = np.einsum("mab,mac->mbc", roots, top)
    query = np.stack([linalg.solve_triangular(root, own) for root, own in zip(roots, top, strict=True)])
    size = float(np.sqrt(np.mean(key**2) / max(float(np.mean(query**2)), 1e-300))) or 1.0
    scale = np.sqrt(size)
    return query * scale, key / scale, (float(np.maximum(values[:-dim], 0.0).sum()), float(values.sum()))


def _root(gram: Array64) -> Array64:
    return cholesky_upper(gram, _RIDGE) if np.trace(gram) > 0.0 else np.eye(len(gram)) * 1e-6


def _turned(
    query: Array64, key: Array64, query_MDD: Array64, blocks: Array64, first: int, second: int
) -> tuple[float, float]:
    """One frequency: fills the maps with complex factors; returns what is lost and what there was."""
    strength = np.sqrt(query_MDD[:, first, first] + query_MDD[:, second, second])
    strength = np.maximum(strength, 1e-6 * max(float(strength.max()), 1e-12))
    real = blocks[:, first, :, first] + blocks[:, second, :, second]
    turned = blocks[:, second, :, first] - blocks[:, first, :, second]
    hermitian = (real + 1j * turned) * np.outer(strength, strength)
    values, vectors = np.linalg.eigh((hermitian + hermitian.conj().T) / 2.0)
    top, mean = vectors[:, -1].conj(), float(np.sqrt(np.mean(strength**2)))
    for maps, factor in ((query, top * mean / strength), (key, top * strength / mean)):
        maps[:, first, first] = maps[:, second, second] = factor.real
        maps[:, second, first], maps[:, first, second] = -factor.imag, factor.imag
    return float(np.maximum(values[:-1], 0.0).sum()), float(values.sum())


@dataclass(frozen=True, eq=False)
class MergedValues:
    """The shared head as a map (M*D, D) of the members' values, and the output weights (D, C) of every reader."""

    map_KD: Array64
    weight_HDC: Array64
    lost: float


def merge_values(
    mixed_HKK: Array64,
    weight_HDC: Array64,
    member_of: Sequence[int],
    sweeps: int = _SWEEPS,
    rank: int | None = None,
) -> MergedValues:
    """One value head for readers H, of which reader h read member `member_of[h]`, by alternating least squares.

    `mixed_HKK` are Grams of what each reader makes of all members' values (K = M*D), `weight_HDC` its output weights.
    The shared head has `rank` dims, D unless told. Raises `ValueError` if that is none of 1 to K.
    """
    heads, dim, _ = weight_HDC.shape
    size = dim if rank is None else rank
    if not 1 <= size <= mixed_HKK.shape[1]:
        raise ValueError(f"a shared head of {size} dims")
    bases = [linalg.qr(weight.T, mode="economic") for weight in weight_HDC]
    wanted_HKE = np.zeros((heads, mixed_HKK.shape[1], bases[0][1].shape[0]))
    for head, (_, upper) in enumerate(bases):
        wanted_HKE[head, member_of[head] * dim : (member_of[head] + 1) * dim] = upper.T
    root = _root(mixed_HKK.sum(axis=0))
    left = np.linalg.svd(root @ np.concatenate(list(wanted_HKE), axis=1), full_matrices=True)[0][:, :size]
    shared = np.asarray(linalg.solve_triangular(root, left))
    readers = _readers(mixed_HKK, wanted_HKE, shared)
    for _ in range(sweeps):
        shared = _shared(mixed_HKK, wanted_HKE, shared, readers)
        readers = _readers(mixed_HKK, wanted_HKE, shared)
    error, energy = wanted_HKE - shared @ readers, np.sum(wanted_HKE * (mixed_HKK @ wanted_HKE))
    lost = float(np.sum(error * (mixed_HKK @ error)) / max(float(energy), 1e-300))
    scale = np.sqrt(max(float(np.mean(np.diagonal(shared.T @ shared))), 1e-300))
    weights = np.stack([reader @ basis[0].T for reader, basis in zip(readers, bases, strict=True)])
    return MergedValues(shared / scale, weights * scale, lost)


def _readers(mixed_HKK: Array64, wanted_HKE: Array64, shared_KD: Array64) -> Array64:
    """Least squares around what the shared head spans by itself, so that a head that spans everything is exact."""
    spanned_HDE = np.linalg.pinv(shared_KD) @ wanted_HKE
    left_HKE = wanted_HKE - shared_KD @ spanned_HDE
    grams, rights = shared_KD.T @ mixed_HKK @ shared_KD, shared_KD.T @ mixed_HKK @ left_HKE
    solved = [solve_gram(_lifted(gram), right) for gram, right in zip(grams, rights, strict=True)]
    return np.asarray(spanned_HDE + np.stack(solved))


def _lifted(gram: Array64) -> Array64:
    return gram + 1e-10 * max(float(np.trace(gram)) / len(gram), 1e-30) * np.eye(len(gram))


def _shared(mixed_HKK: Array64, wanted_HKE: Array64, start_KD: Array64, readers_HDE: Array64) -> Array64:
    """The best shared head for given readers: conjugate gradients on ``sum N_h X b_h b_h' = sum N_h L_h b_h'``."""
    outer_HDD = readers_HDE @ readers_HDE.transpose(0, 2, 1)
    found = start_KD.copy()
    residual = np.sum(mixed_HKK @ (wanted_HKE @ readers_HDE.transpose(0, 2, 1) - found @ outer_HDD), axis=0)
    step, size = residual.copy(), float(np.sum(residual**2))
    smallest = 1e-24 * size
    for _ in range(_STEPS):
        if size <= smallest or size == 0.0:
            break
        moved = np.sum(mixed_HKK @ (step @ outer_HDD), axis=0)
        length = size / max(float(np.sum(step * moved)), 1e-300)
        found += length * step
        residual -= length * moved
        before, size = size, float(np.sum(residual**2))
        step = residual + (size / before) * step
    return found


def equal_groups(errors: Array64, groups: int) -> tuple[tuple[int, ...], ...]:
    """Members in groups of one size whose pairwise errors are small: greedy, then swaps while their sum falls."""
    count = len(errors)
    size, left = count // groups, list(range(count))
    found: list[list[int]] = []
    while left:
        seed = min(left, key=lambda one: min((errors[one, other] for other in left if other != one), default=0.0))
        group = [seed]
        left.remove(seed)
        while len(group) < size:
            best = min(left, key=lambda one: float(errors[one, group].sum()))
            group.append(best)
            left.remove(best)
        found.append(group)
    while _swap(errors, found):
        pass
    return tuple(sorted(tuple(sorted(group)) for group in found))


def _swap(errors: Array64, groups: list[list[int]]) -> bool:
    """Exchange two members of different groups if that takes something off the sum; whether it was done."""
    for a, one in enumerate(groups):
        for other in groups[a + 1 :]:
            for i, x in enumerate(one):
                for j, y in enumerate(other):
                    rest, others = [m for m in one if m != x], [m for m in other if m != y]
                    before = errors[x, rest].sum() + errors[y, others].sum()
                    after = errors[y, rest].sum() + errors[x, others].sum()
                    if after < before - 1e-9 * abs(before) - 1e-15:
                        one[i], other[j] = y, x
                        return True
    return False
