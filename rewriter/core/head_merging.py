"""Key and value heads of one attention merged into fewer: `merging` applied to a site."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.core.basis import apart, recombined
from rewriter.core.merging import Merged, MergedValues, merge_keys, merge_values
from rewriter.core.operand import Projection
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import output_weights
from rewriter.core.site import AttentionSite
from rewriter.core.statistics import Array64, AttentionStatistics

MOST_NUMBERS = 1 << 26  # of the Grams of every head's mixture of all values: half a gigabyte


def merging_refusal(site: AttentionSite) -> Refusal | None:
    """Why the heads of a site cannot be merged, weights and signature apart."""
    if site.key.heads < 2:
        return Refusal("one-head", "there is a single key head")
    if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
        return Refusal("shared-query-heads", "query heads are shared, so they cannot follow their keys")
    if site.key.head_of != site.value.head_of or site.key.heads != site.value.heads:
        return Refusal("uneven-groups", "keys and values are shared by different heads")
    if site.query.norm is not None or site.key.norm is not None:
        return Refusal("head-norm", "queries or keys pass a norm per head, which a change of basis would alter")
    if site.value.norm is not None or site.value.rotary is not None:
        return Refusal("value-not-plain", "values pass a norm or a rotation after their projection")
    if turn_of(site.query) != turn_of(site.key):
        return Refusal("rotated-apart", "queries and keys are rotated in different ways")
    if site.key.rotary is not None and site.key.rotary.keep:
        return Refusal("pairs-dropped", "heads have kept different frequencies, which cannot be added")
    return too_large(site)


def too_large(site: AttentionSite) -> Refusal | None:
    """Whether what every head makes of all values outgrows memory."""
    if site.heads * (site.value.heads * site.v_dim) ** 2 > MOST_NUMBERS:
        return Refusal("too-large", f"{site.heads} heads over {site.value.heads} values need too much memory")
    return None


def turn_of(operand: Projection) -> tuple[int, bool] | None:
    """How many dims turn and how pairs lie, None where nothing turns."""
    return None if operand.rotary is None else (operand.rotary.size, operand.rotary.interleaved)


def pair_errors(site: AttentionSite, facts: AttentionStatistics) -> Array64:
    """What merging any two key/value heads alone would lose, (G, G)."""
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
    size, interleaved = turn_of(site.key) or (0, False)
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


def merged(site: AttentionSite, facts: AttentionStatistics, groups: tuple[tuple[int, ...], ...]) -> AttentionSite:
    """The site with one key/value head for every group of them; a cache holds the merged heads."""
    assert site.output is not None
    query_GDD = np.zeros((site.heads, site.qk_dim, site.qk_dim))
    key_maps = np.zeros((site.key.heads, site.qk_dim, len(groups), site.qk_dim))
    value_maps = np.zeros((site.value.heads, site.v_dim, len(groups), site.v_dim))
    weight_HDC = np.zeros(site.output.weight_HDC.shape)
    new_head = [0] * site.heads
    for index, group in enumerate(groups):
        keys, values = _keys(site, facts, group), _values(site, facts, group)
        readers = _readers(site, group)
        weight_HDC[readers] = values.weight_HDC
        for place, member in enumerate(group):
            key_maps[member, :, index] = keys.key_MDD[place]
            value_maps[member, :, index] = values.map_KD[place * site.v_dim : (place + 1) * site.v_dim]
        for head in readers:
            new_head[head] = index
            query_GDD[site.query.head_of[head]] = keys.query_MDD[group.index(site.key.head_of[head])]
    head_of = tuple(new_head)
    return replace(
        site,
        query=recombined(site.query, apart(query_GDD), site.query.head_of),
        key=recombined(site.key, key_maps, head_of),
        value=recombined(site.value, value_maps, head_of),
        output=replace(site.output, weight_HDC=weight_HDC.astype(site.output.weight_HDC.dtype)),
    )
