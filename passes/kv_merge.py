"""Fewer key and value heads: several are aligned and merged into one by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.errors import OptionError
from rewriter.core.memo import IdentityMemo
from rewriter.core.merging import Merged, MergedValues, equal_groups, merge_keys, merge_values
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_input, attention_refusal, out_of_range, output_weights
from rewriter.core.site import Array, AttentionSite, Projection, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, Statistics
from rewriter.core.target import Target

_MOST_NUMBERS = 1 << 26  # of the Grams of every head's mixture of all values: half a gigabyte


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
        if site.key.heads < 2:
            return Refusal("one-head", "there is a single key head")
        if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
            return Refusal("shared-query-heads", "query heads are shared, so they cannot follow their keys")
        if site.key.head_of != site.value.head_of or site.key.heads != site.value.heads:
            return Refusal("uneven-groups", "keys and values are shared by different heads")
        if site.query.norm is not None or site.key.norm is not None:
            return Refusal("head-norm", "queries or keys pass a norm per head, which a change of basis would alter")
        if not site.value.plain:
            return Refusal("value-not-plain", "values pass a norm or a rotation after their projection")
        if _turn(site.query) != _turn(site.key):
            return Refusal("rotated-apart", "queries and keys are rotated in different ways")
        if site.key.rotary is not None and site.key.rotary.keep:
            return Refusal("pairs-dropped", "heads have kept different frequencies, which cannot be added")
        if site.heads * (site.value.heads * site.v_dim) ** 2 > _MOST_NUMBERS:
            return Refusal("too-large", f"{site.heads} heads over {site.value.heads} values need too much memory")
        return None

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
        errors = self._errors.get((own, facts), lambda: _Errors(_pair_errors(own, facts)))
        if count not in errors.groups:
            errors.groups[count] = equal_groups(errors.pairs_GG, count)
        return _merged(own, facts, errors.groups[count])


def _turn(operand: Projection) -> tuple[int, bool] | None:
    return None if operand.rotary is None else (operand.rotary.size, operand.rotary.interleaved)


def _pair_errors(site: AttentionSite, facts: AttentionStatistics) -> Array64:
    count = site.key.heads
    errors = np.zeros((count, count))
    for one in range(count):
        for other in range(one + 1, count):
            keys, values = _keys(site, facts, (one, other)), _values(site, facts, (one, other), sweeps=0)
            errors[one, other] = errors[other, one] = keys.lost + values.lost
    return errors


def _readers(site: AttentionSite, group: tuple[int, ...]) -> list[int]:
    return [head for head in range(site.heads) if site.key.head_of[head] in group]


def _keys(site: AttentionSite, facts: AttentionStatistics, group: tuple[int, ...]) -> Merged:
    assert facts.joint_key is not None
    columns = (np.array(group)[:, None] * site.qk_dim + np.arange(site.qk_dim)).reshape(-1)
    grams = [sum(facts.query_HDD[h] for h in range(site.heads) if site.key.head_of[h] == member) for member in group]
    zeros = np.zeros((site.qk_dim, site.qk_dim))
    size, interleaved = _turn(site.key) or (0, False)
    return merge_keys(
        np.stack([gram + zeros for gram in grams]), facts.joint_key[np.ix_(columns, columns)], size, interleaved
    )


def _values(site: AttentionSite, facts: AttentionStatistics, group: tuple[int, ...], **how: int) -> MergedValues:
    assert facts.mixed_HKK is not None
    columns = (np.array(group)[:, None] * site.v_dim + np.arange(site.v_dim)).reshape(-1)
    readers = _readers(site, group)
    weight_HDC = output_weights(site)[:-1].reshape(site.heads, site.v_dim, -1)[readers]
    members = [group.index(site.value.head_of[head]) for head in readers]
    mixed = facts.mixed_HKK[np.array(readers)][:, columns[:, None], columns[None]]
    return merge_values(mixed, weight_HDC, members, **how)


def _merged(site: AttentionSite, facts: AttentionStatistics, groups: tuple[tuple[int, ...], ...]) -> AttentionSite:
    assert site.output is not None
    query_GDD = np.zeros((site.heads, site.qk_dim, site.qk_dim))
    key_maps: dict[tuple[int, int], Array64] = {}
    value_maps: dict[tuple[int, int], Array64] = {}
    weight_HDC = np.zeros(site.output.weight_HDC.shape)
    new_head = [0] * site.heads
    for index, group in enumerate(groups):
        keys, values = _keys(site, facts, group), _values(site, facts, group)
        readers = _readers(site, group)
        weight_HDC[readers] = values.weight_HDC
        for place, member in enumerate(group):
            key_maps[index, member] = keys.key_MDD[place]
            value_maps[index, member] = values.map_KD[place * site.v_dim : (place + 1) * site.v_dim]
        for head in readers:
            new_head[head] = index
            query_GDD[site.query.head_of[head]] = keys.query_MDD[group.index(site.key.head_of[head])]
    head_of = tuple(new_head)
    queries = {(head, head): one for head, one in enumerate(query_GDD)}
    return replace(
        site,
        query=_mapped(site.query, queries, site.query.heads, site.query.head_of),
        key=_mapped(site.key, key_maps, len(groups), head_of),
        value=_mapped(site.value, value_maps, len(groups), head_of),
        output=replace(site.output, weight_HDC=weight_HDC.astype(site.output.weight_HDC.dtype)),
    )


def _mapped(
    operand: Projection, maps: Mapping[tuple[int, int], Array64], count: int, head_of: tuple[int, ...]
) -> Projection:
    """Each new head is the sum of old heads times their maps, given by (new, old)."""
    weight = operand.weight_CGD
    assert weight is not None
    width, _, dim = weight.shape
    made, bias = np.zeros((width, count, dim)), np.zeros((count, dim))
    for (new, old), one in maps.items():
        made[:, new] += weight[:, old].astype(np.float64) @ one
        if operand.bias_GD is not None:
            bias[new] += operand.bias_GD[old].astype(np.float64) @ one
    kept: Array | None = None if operand.bias_GD is None else bias.astype(operand.bias_GD.dtype)
    return replace(operand, weight_CGD=made.astype(weight.dtype), bias_GD=kept, head_of=head_of)
