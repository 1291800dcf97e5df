"""Fewer key and value heads: several are aligned and merged into one by least squares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rewriter.core.errors import OptionError
from rewriter.core.head_merging import merged, merging_refusal, pair_errors
from rewriter.core.memo import IdentityMemo
from rewriter.core.merging import equal_groups
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_input, attention_refusal, out_of_range
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import Array64, Detail, Statistics
from rewriter.core.target import Target


@dataclass(frozen=True, eq=False)
class _Errors:
    """What merging any two heads alone would lose, (G, G), and the groups found for a number of them."""

    pairs_GG: Array64
    groups: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class KvMerge(Pass):
    """Turn multi-head into grouped-query attention: heads that can share keys and values do.

    What it does
        Puts key/value heads into ``groups`` of equal size by what merging pairs of them would lose, and gives each
        group one head: the leading components of its keys as queries see them, and the values that serve the readers'
        output weights best. Queries and W_o are mapped accordingly. Under a rotary embedding the maps are one complex
        number per head and frequency, which is all that commutes with it.
    When it applies
        Query heads own their weights, keys and values are shared alike, values are a bare projection, no norm per
        head, no cache, queries and keys rotated alike and with one set of frequencies, and not so many heads that
        their statistics outgrow memory.
    Exact or calibrated
        Calibrated; exact where heads of a group are copies of each other up to a change of basis (or phase).
    What it costs
        Statistics of every head's mixture of all values; seconds per layer.
    Before and after
        12 key/value heads -> ``kv_merge{groups=4}``: W_k, W_v and a cache three times smaller, as many query heads.
    Source
        Grouped queries: Ainslie et al. 2023, there by mean and training; here by principal components and alternating
        least squares without training.
    """

    name: ClassVar[str] = "kv_merge"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 15
    requires: ClassVar[frozenset[Detail]] = frozenset({"heads", "joint_keys", "mixed"})
    combines: ClassVar[bool] = False

    _errors: ClassVar[IdentityMemo[_Errors]] = IdentityMemo()

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        return merging_refusal(site)

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Every number of groups that divides the heads evenly."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        count = site.key.heads
        return tuple(Option.of(self.name, site.id, groups=g) for g in range(count // 2, 0, -1) if count % g == 0)

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        count = option.integer("groups")
        if not 1 <= count <= own.key.heads or own.key.heads % count:
            raise out_of_range(option, "groups", 1, own.key.heads)
        if count == own.key.heads:
            return own
        if facts.joint_key is None or facts.mixed_HKK is None:
            raise OptionError(f"{option} needs statistics of all heads together", "Give calibration data with --data")
        errors = self._errors.get((own, facts), lambda: _Errors(pair_errors(own, facts)))
        if count not in errors.groups:
            errors.groups[count] = equal_groups(errors.pairs_GG, count)
        return merged(own, facts, errors.groups[count])
