"""Fewer dims per query and key head, by a whitened singular value decomposition of the score map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy import linalg

from rewriter.core.errors import OptionError
from rewriter.core.linalg import cholesky_upper
from rewriter.core.memo import IdentityMemo
from rewriter.core.option import Option
from rewriter.core.pairs import Index, dropping_order, kept_columns, pair_errors
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_input, attention_refusal, out_of_range
from rewriter.core.site import Array, AttentionSite, Projection, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, Statistics
from rewriter.core.target import Target

_RIDGE = 1e-6  # only makes the factorisation succeed; it cancels at full rank


@dataclass(frozen=True, eq=False)
class _Bases:
    """Per key head: maps of a query (D, D) and of a key (D, D) whose leading columns are the best of every rank."""

    query_GDD: Array64
    key_GDD: Array64
    singular_GD: Array64


@dataclass(frozen=True)
class LowRankQK(Pass):
    """Keep the directions of each query/key head that move the scores most.

    What it does
        Multiplies W_q (and its bias) and W_k by small matrices so that heads have ``rank`` dims and the scores are the
        best rank-``rank`` approximation of what they were on the calibration set. Keys are centred per sequence first,
        because softmax ignores what is equal for all keys; for the same reason the key bias goes. In grouped-query
        attention the heads of a group share one pair of maps. The scale stays as it is.
        Under a rotary embedding only whole frequency pairs can leave: per key head those whose squared centred scores
        are least missed, one after the other, and its tables keep the columns of the rest. Dims that are not rotated
        are cut by the first method; what both cost decides how many of each stay.
    When it applies
        No norm per head, no cache, no soft-cap, no sink, and queries and keys rotated alike or not at all.
    Exact or calibrated
        Calibrated; exact at full rank, or at the true rank of the scores.
    What it costs
        One Cholesky and one SVD of head dim^2 per head: milliseconds. Pairs dropped per head make the tables wider.
    Before and after
        12 heads x 32 -> ``low_rank_qk{rank=16}``: W_q and W_k half as wide, half the work of Q K^T; V is untouched.
    Source
        Eckart and Young 1936 on Gram-whitened factors; data-aware form as in CLOVER (Meng et al. 2024) and SVD-LLM
        (Wang et al. 2024), here joint in Q and K and centred in the keys; pairs as in MoDeGPT (Lin et al. 2024), here
        with cross terms, centred, and per sequence.
    """

    name: ClassVar[str] = "low_rank_qk"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 20
    requires: ClassVar[frozenset[Detail]] = frozenset({"heads", "products"})

    _bases: ClassVar[IdentityMemo[_Bases]] = IdentityMemo()

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        for operand, name in ((site.query, "queries"), (site.key, "keys")):
            if operand.norm is not None:
                return Refusal("head-norm", f"{name} pass a norm per head, which a change of basis would alter")
        if _turn(site.query) != _turn(site.key):
            return Refusal("rotated-apart", "queries and keys are rotated in different ways, so pairs do not match")
        if site.softcap:
            return Refusal("soft-cap", "a soft-cap on the scores sees what softmax ignores, such as the mean key")
        if site.sink_H is not None or site.bias.kept[1]:
            return Refusal("sink", "scores that do not move with the keys see what softmax ignores elsewhere")
        if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
            return Refusal("shared-query-heads", "query heads are shared between key groups")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Multiples of 8, for large heads of the vector width, below the head dim."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        step = 8 if site.qk_dim <= 64 else max(8, target.vector_floats)
        lowest = 0 if site.query.rotary is None else 1  # a pair takes two dims, and one of them must stay
        ranks = range((site.qk_dim - 1) // step * step, lowest, -step)
        return tuple(Option.of(self.name, site.id, rank=rank) for rank in ranks)

    def score_losses(self, site: Site, statistics: Statistics) -> dict[int, float]:
        """The share of the squared centred scores that is lost at every rank, summed over heads."""
        assert isinstance(site, AttentionSite) and isinstance(statistics, AttentionStatistics)
        squares = self._bases_of(site, statistics).singular_GD ** 2
        tail = np.cumsum(squares.sum(axis=0)[::-1])[::-1]
        return {rank: float(tail[rank] / tail[0]) if rank < len(tail) else 0.0 for rank in range(1, len(tail) + 1)}

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; the output projection stays, since its features change in no linear way."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        rank = option.integer("rank")
        if not 1 <= rank <= own.qk_dim:
            raise out_of_range(option, "rank", 1, own.qk_dim)
        if own.query.rotary is not None:
            return _without_pairs(own, facts, option, rank)
        bases = self._bases_of(own, facts)
        query_HDR = np.empty((own.heads, own.qk_dim, rank))
        for head in range(own.heads):
            query_HDR[own.query.head_of[head]] = bases.query_GDD[own.key.head_of[head], :, :rank]
        return replace(
            own,
            query=_changed(own.query, query_HDR),
            key=replace(_changed(own.key, bases.key_GDD[:, :, :rank]), bias_GD=None),
        )

    def _bases_of(self, site: AttentionSite, statistics: AttentionStatistics) -> _Bases:
        return self._bases.get((site, statistics), lambda: _factor(site, statistics))


def _turn(operand: Projection) -> tuple[int, bool] | None:
    return None if operand.rotary is None else (operand.rotary.size, operand.rotary.interleaved)


def _without_pairs(site: AttentionSite, facts: AttentionStatistics, option: Option, rank: int) -> AttentionSite:
    """The site with `rank` dims per head: the best pairs of each key head, then the best of the dims not rotated."""
    turn = site.query.rotary
    assert turn is not None
    if facts.products_HDD is None:
        raise OptionError(f"{option} needs products of query and key Grams", "Give calibration data with --data")
    if rank == site.qk_dim:
        return site
    groups = [[h for h in range(site.heads) if site.key.head_of[h] == group] for group in range(site.key.heads)]
    products = [facts.products_HDD[members].sum(axis=0) for members in groups]
    orders = [dropping_order(pair_errors(one, turn.size, turn.interleaved)) for one in products]
    rest = _factor(site, facts, turn.size) if turn.size < site.qk_dim else None
    pairs = _pairs_to_keep(site, rank, turn.size, orders, products, rest)
    if pairs is None:
        raise OptionError(f"{option} is no sum of whole frequency pairs", "Choose an even rank of two or more")
    kept = [kept_columns(order[turn.size // 2 - pairs :], turn.size, turn.interleaved) for order, _ in orders]
    key = _cut(site.key, kept, None if rest is None else rest.key_GDD[:, :, : rank - 2 * pairs], idle_bias=True)
    per_query = [0] * site.heads
    for head in range(site.heads):
        per_query[site.query.head_of[head]] = site.key.head_of[head]
    basis = None if rest is None else rest.query_GDD[per_query][:, :, : rank - 2 * pairs]
    return replace(site, query=_cut(site.query, [kept[group] for group in per_query], basis, idle_bias=False), key=key)


def _pairs_to_keep(
    site: AttentionSite, rank: int, size: int, orders: list[tuple[Index, Array64]], products: list[Array64],
    rest: _Bases | None,
) -> int | None:  # fmt: skip
    """How many pairs stay, so that pairs and other dims together cost least; None if no number fits the rank."""
    others = site.qk_dim - size
    cost = np.sum([np.concatenate([costs[::-1], [0.0]]) for _, costs in orders], axis=0)  # by pairs that stay
    tail = np.zeros(others + 1)  # by other dims that stay
    if rest is not None:
        for squares, own in zip(rest.singular_GD**2, products, strict=True):
            share = float(own[size:, size:].sum()) / max(float(squares.sum()), 1e-300)
            tail[:-1] += np.cumsum(squares[::-1])[::-1] * share
    fitting = [p for p in range(1, size // 2 + 1) if 0 <= rank - 2 * p <= others]
    return min(fitting, key=lambda p: float(cost[p] + tail[rank - 2 * p]), default=None)


def _cut(operand: Projection, kept: list[tuple[int, ...]], basis_GDR: Array64 | None, idle_bias: bool) -> Projection:
    """The operand with these rotated columns of every head, and what a basis makes of the columns not rotated."""
    turn, weight = operand.rotary, operand.weight_CGD
    assert turn is not None and weight is not None
    chosen = np.array(kept)
    weight_CGR = np.take_along_axis(weight, chosen[None], axis=2)
    bias = None if operand.bias_GD is None else np.take_along_axis(operand.bias_GD, chosen, axis=1)
    if basis_GDR is not None:
        plain = replace(
            operand, weight_CGD=weight[:, :, turn.size :], bias_GD=_beyond(operand.bias_GD, turn.size, idle_bias)
        )
        changed = _changed(plain, basis_GDR)
        weight_CGR = np.concatenate([weight_CGR, changed.weight_CGD], axis=2)
        bias = None if bias is None or changed.bias_GD is None else np.concatenate([bias, changed.bias_GD], axis=1)
    before = turn.keep or (tuple(range(turn.size)),) * len(kept)
    tables = tuple(tuple(old[column] for column in new) for old, new in zip(before, kept, strict=True))
    rotary = replace(turn, size=len(kept[0]), keep=tables)
    return replace(operand, weight_CGD=np.ascontiguousarray(weight_CGR), bias_GD=bias, rotary=rotary)


def _beyond(bias_GD: Array | None, size: int, idle: bool) -> Array | None:
    """The bias of the columns not rotated: of keys it is idle."""
    if bias_GD is None:
        return None
    return np.zeros_like(bias_GD[:, size:]) if idle else bias_GD[:, size:]


def _factor(site: AttentionSite, statistics: AttentionStatistics, start: int = 0) -> _Bases:
    """Maps of the dims from `start` on. ``R_q R_k' = U S V'``; maps ``R_q^-1 U S^1/2`` and ``R_k^-1 V S^1/2``.

    They are inverse to each other at full rank.
    """
    dim = site.qk_dim - start
    query_GDD, key_GDD = np.empty((site.key.heads, dim, dim)), np.empty((site.key.heads, dim, dim))
    singular_GD = np.zeros((site.key.heads, dim))
    for group in range(site.key.heads):
        members = [head for head in range(site.heads) if site.key.head_of[head] == group]
        gram_q = statistics.query_HDD[members, start:, start:].sum(axis=0)
        gram_k = statistics.key_GDD[group, start:, start:]
        if min(np.trace(gram_q), np.trace(gram_k)) <= 0.0:
            query_GDD[group] = key_GDD[group] = np.eye(dim)
            continue
        root_q, root_k = cholesky_upper(gram_q, _RIDGE), cholesky_upper(gram_k, _RIDGE)
        left, singular, right = np.linalg.svd(root_q @ root_k.T)
        scale = np.sqrt(singular)
        query_GDD[group] = linalg.solve_triangular(root_q, left * scale)
        key_GDD[group] = linalg.solve_triangular(root_k, right.T * scale)
        singular_GD[group] = singular
    return _Bases(query_GDD, key_GDD, singular_GD)


def _changed(operand: Projection, basis_GDR: Array64) -> Projection:
    assert operand.weight_CGD is not None
    dtype = operand.weight_CGD.dtype
    weight: Array = np.einsum("cgd,gdr->cgr", operand.weight_CGD.astype(np.float64), basis_GDR).astype(dtype)
    if operand.bias_GD is None:
        return replace(operand, weight_CGD=weight)
    bias = np.einsum("gd,gdr->gr", operand.bias_GD.astype(np.float64), basis_GDR).astype(dtype)
    return replace(operand, weight_CGD=weight, bias_GD=bias)
