"""Fewer dims per value head, by a whitened singular value decomposition of value times output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy import linalg

from rewriter.core.linalg import cholesky_upper, ridge_towards
from rewriter.core.memo import IdentityMemo
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import (
    RIDGE,
    Pass,
    attention_input,
    attention_refusal,
    out_of_range,
    output_weights,
    with_output_weights,
)
from rewriter.core.site import Array, AttentionSite, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Statistics
from rewriter.core.target import Target

_RIDGE = 1e-6  # only makes the factorisation succeed; it cancels at full rank


@dataclass(frozen=True, eq=False)
class _Bases:
    """Per value head G: the map of a value (D, D), best of every rank first, and its inverse."""

    map_GDD: Array64
    inverse_GDD: Array64


@dataclass(frozen=True)
class LowRankVO(Pass):
    """Keep the directions of each value head that move the output most.

    What it does
        Multiplies W_v (and its bias) by a small matrix so that value heads have ``rank`` dims, the best for what the
        output projection makes of them on the calibration set, and refits W_o and its bias jointly over all heads.
        Head results are centred first: the output bias carries their mean. In grouped-query attention the heads of a
        group share one map. Positions do not matter, since values are never rotated.
    When it applies
        Values are a bare projection; nothing inside is read from outside; no cache is in the signature.
    Exact or calibrated
        Calibrated; exact at full rank, or at the true rank of value times output.
    What it costs
        One Cholesky and one SVD of head dim^2 per head and one solve of (heads x rank)^2: under a second.
    Before and after
        12 heads x 32 -> ``low_rank_vo{rank=24}``: W_v, W_o and the mixing a quarter smaller; Q and K are untouched.
    Source
        Eckart and Young 1936 on the Gram-whitened product, as in MoDeGPT (Lin et al. 2024) and CLOVER (Meng et al.
        2024); that the head-sized Gram suffices is checked in tests/passes/test_low_rank_vo.py.
    """

    name: ClassVar[str] = "low_rank_vo"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 30

    _bases: ClassVar[IdentityMemo[_Bases]] = IdentityMemo()

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        if not site.value.plain:
            return Refusal("value-not-plain", "values pass a norm or a rotation after their projection")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Multiples of 8, for large heads of the vector width, below the head dim."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        step = 8 if site.v_dim <= 64 else max(8, target.vector_floats)
        ranks = range((site.v_dim - 1) // step * step, 0, -step)
        return tuple(Option.of(self.name, site.id, rank=rank) for rank in ranks)

    def losses(self, site: Site, statistics: Statistics) -> Mapping[Option, float]:
        """See `Pass.losses`: for every multiple of 8, after the joint refit."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return {}
        found = {}
        for rank in (*range(8, site.v_dim, 8), site.v_dim):
            option = Option.of(self.name, site.id, rank=rank)
            mapped = statistics.regression.map(self._blocks(site, statistics, rank))
            found[option] = mapped.loss(output_weights(self.apply(site, option, statistics)))
        return found

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """Block-diagonal: the basis of each head."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        return self._blocks(own, facts, option.integer("rank"))

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        rank = option.integer("rank")
        if not 1 <= rank <= own.v_dim:
            raise out_of_range(option, "rank", 1, own.v_dim)
        bases = self._bases_of(own, facts)
        assert own.value.weight_CGD is not None
        dtype = own.value.weight_CGD.dtype
        basis_GDR = bases.map_GDD[:, :, :rank]
        weight = np.einsum("cgd,gdr->cgr", own.value.weight_CGD.astype(np.float64), basis_GDR)
        bias = own.value.bias_GD
        value = replace(
            own.value,
            weight_CGD=weight.astype(dtype),
            bias_GD=None if bias is None else np.einsum("gd,gdr->gr", bias.astype(np.float64), basis_GDR).astype(dtype),
        )
        return with_output_weights(replace(own, value=value), self._refit(own, facts, rank))

    def _refit(self, site: AttentionSite, statistics: AttentionStatistics, rank: int) -> Array64:
        """All output weights jointly, pulled towards what truncation leaves of the present ones."""
        bases, weights = self._bases_of(site, statistics), output_weights(site)
        width = weights.shape[1]
        weight_HDC = weights[:-1].reshape(site.heads, site.v_dim, width)
        inverse_HRD = bases.inverse_GDD[list(site.value.head_of), :rank]
        current = np.vstack([(inverse_HRD @ weight_HDC).reshape(-1, width), weights[-1:]])
        mapped = statistics.features.map(self._blocks(site, statistics, rank))
        return ridge_towards(mapped, current, RIDGE)

    def _blocks(self, site: AttentionSite, statistics: Statistics, rank: int) -> Array64:
        assert isinstance(statistics, AttentionStatistics)
        bases = self._bases_of(site, statistics)
        return np.asarray(linalg.block_diag(*(bases.map_GDD[group, :, :rank] for group in site.value.head_of)))

    def _bases_of(self, site: AttentionSite, statistics: AttentionStatistics) -> _Bases:
        return self._bases.get((site, statistics), lambda: _factor(site, statistics))


def _factor(site: AttentionSite, statistics: AttentionStatistics) -> _Bases:
    """``R [W_o of the group] = U S V'`` with ``R'R`` the centred Gram of the group's results; the map is ``R^-1 U``."""
    dim, regression = site.v_dim, statistics.features
    mean = regression.gram[-1, :-1]
    centred = regression.gram[:-1, :-1] - np.outer(mean, mean) / max(regression.tokens, 1)
    weight_HDC = output_weights(site)[:-1].reshape(site.heads, dim, -1)
    map_GDD, inverse_GDD = np.empty((site.value.heads, dim, dim)), np.empty((site.value.heads, dim, dim))
    for group in range(site.value.heads):
        members = [head for head in range(site.heads) if site.value.head_of[head] == group]
        blocks = [slice(head * dim, (head + 1) * dim) for head in members]
        gram = np.sum([centred[block, block] for block in blocks], axis=0) if members else np.zeros((dim, dim))
        energy = float(np.trace(gram)) / dim
        if energy <= 0.0:
            map_GDD[group] = inverse_GDD[group] = np.eye(dim)
            continue
        root = cholesky_upper(gram, _RIDGE)
        product = root @ np.concatenate([weight_HDC[head] for head in members], axis=1)
        left = np.linalg.svd(product, full_matrices=product.shape[1] < dim)[0]
        map_GDD[group] = linalg.solve_triangular(root, left) * np.sqrt(energy)  # results keep their scale
        inverse_GDD[group] = left.T @ root / np.sqrt(energy)
    return _Bases(map_GDD, inverse_GDD)
