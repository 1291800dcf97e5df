"""Fewer dims per value head, by a whitened singular value decomposition of value times output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rewriter.core.basis import apart, recombined
from rewriter.core.memo import IdentityMemo
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import (
    Pass,
    attention_input,
    attention_refusal,
    out_of_range,
    output_weights,
    with_output_weights,
)
from rewriter.core.site import Array, AttentionSite, Site
from rewriter.core.statistics import AttentionStatistics, Statistics
from rewriter.core.target import Target
from rewriter.core.value_bases import ValueBases, value_bases


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

    _bases: ClassVar[IdentityMemo[ValueBases]] = IdentityMemo()

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
            mapped = statistics.regression.map(self._bases_of(site, statistics).blocks(site, rank))
            found[option] = mapped.loss(output_weights(self.apply(site, option, statistics)))
        return found

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """Block-diagonal: the basis of each head."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        return self._bases_of(own, facts).blocks(own, option.integer("rank"))

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        rank = option.integer("rank")
        if not 1 <= rank <= own.v_dim:
            raise out_of_range(option, "rank", 1, own.v_dim)
        bases = self._bases_of(own, facts)
        value = recombined(own.value, apart(bases.map_GDD[:, :, :rank]), own.value.head_of)
        return with_output_weights(replace(own, value=value), bases.refit(own, facts, rank))

    def _bases_of(self, site: AttentionSite, statistics: Statistics) -> ValueBases:
        assert isinstance(statistics, AttentionStatistics)
        return self._bases.get((site, statistics), lambda: value_bases(site, statistics))
