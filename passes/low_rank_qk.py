"""Fewer dims per query and key head, by a whitened singular value decomposition of the score map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy import linalg

from rewriter.core.linalg import cholesky_upper
from rewriter.core.memo import IdentityMemo
from rewriter.core.option import Option
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
    When it applies
        Queries and keys are bare projections: no rotary embedding, no norm per head, no cache, no soft-cap.
    Exact or calibrated
        Calibrated; exact at full rank, or at the true rank of the scores.
    What it costs
        One Cholesky and one SVD of head dim^2 per head: milliseconds.
    Before and after
        12 heads x 32 -> ``low_rank_qk{rank=16}``: W_q and W_k half as wide, half the work of Q K^T; V is untouched.
    Source
        Eckart and Young 1936 on Gram-whitened factors; data-aware form as in CLOVER (Meng et al. 2024) and SVD-LLM
        (Wang et al. 2024), here joint in Q and K and centred in the keys.
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
            if operand.rotary is not None:
                return Refusal("rotary", f"{name} are rotated by position, which mixes with no projection")
            if operand.norm is not None:
                return Refusal("head-norm", f"{name} pass a norm per head, which a change of basis would alter")
        if site.softcap:
            return Refusal("soft-cap", "a soft-cap on the scores sees what softmax ignores, such as the mean key")
        if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
            return Refusal("shared-query-heads", "query heads are shared between key groups")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Multiples of 8, for large heads of the vector width, below the head dim."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        step = 8 if site.qk_dim <= 64 else max(8, target.vector_floats)
        ranks = range((site.qk_dim - 1) // step * step, 0, -step)
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


def _factor(site: AttentionSite, statistics: AttentionStatistics) -> _Bases:
    """``R_q R_k' = U S V'``; maps ``R_q^-1 U S^1/2`` and ``R_k^-1 V S^1/2``, inverse to each other at full rank."""
    dim = site.qk_dim
    query_GDD, key_GDD = np.empty((site.key.heads, dim, dim)), np.empty((site.key.heads, dim, dim))
    singular_GD = np.zeros((site.key.heads, dim))
    for group in range(site.key.heads):
        members = [head for head in range(site.heads) if site.key.head_of[head] == group]
        gram_q, gram_k = statistics.query_HDD[members].sum(axis=0), statistics.key_GDD[group]
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
