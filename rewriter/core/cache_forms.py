"""What a smaller cache makes of the operands of an attention: parts of keys, a latent of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewriter.core.basis import apart, recombined, together
from rewriter.core.cached_keys import KeyParts, key_maps, key_parts
from rewriter.core.head_merging import turn_of
from rewriter.core.merging import merge_values
from rewriter.core.operand import Projection, Rotary
from rewriter.core.rewrite import output_weights
from rewriter.core.site import AttentionSite
from rewriter.core.statistics import Array64, AttentionStatistics

_SWEEPS = 1  # of the alternation between a latent and its readers: the start is close


def parts_of(site: AttentionSite, facts: AttentionStatistics, shared: bool) -> list[KeyParts]:
    """Of all key heads together, or of each."""
    size, interleaved = turn_of(site.key) or (0, False)
    grams = np.zeros((site.key.heads, site.qk_dim, site.qk_dim))
    for head in range(site.heads):
        grams[site.key.head_of[head]] += facts.query_HDD[head]
    if shared:
        assert facts.joint_key is not None
        return [key_parts(grams, facts.joint_key, size, interleaved)]
    return [key_parts(gram[None], key, size, interleaved) for gram, key in zip(grams, facts.key_GDD, strict=True)]


def with_key_parts(
    site: AttentionSite, parts: Sequence[KeyParts], split: tuple[int, int], shared: bool
) -> tuple[Projection, Projection]:
    """Queries and keys in the parts that stay."""
    size, interleaved = turn_of(site.key) or (0, False)
    made = [key_maps(one, *split, size, interleaved) for one in parts]
    query_GDR = np.concatenate([one[0] for one in made])
    key_GDR = np.concatenate([one[1] for one in made])
    cached_head = [0 if shared else group for group in site.key.head_of]
    query_HDR = np.empty((site.heads, *query_GDR.shape[1:]))
    columns: list[tuple[int, ...]] = [()] * site.heads
    for head in range(site.heads):
        query_HDR[site.query.head_of[head]] = query_GDR[site.key.head_of[head]]
        columns[site.query.head_of[head]] = made[cached_head[head]][2]
    query = recombined(site.query, apart(query_HDR), site.query.head_of)
    key = recombined(site.key, together(key_GDR) if shared else apart(key_GDR), cached_head)
    old = () if site.key.rotary is None else site.key.rotary.keep
    old_of_query = [()] * site.heads if not old else [old[site.key.head_of[head]] for head in _by_query(site)]
    return (
        replace(query, rotary=_turned(site.query.rotary, columns, old_of_query)),
        replace(key, rotary=_turned(site.key.rotary, [one[2] for one in made], old or [()] * len(made))),
    )


def _by_query(site: AttentionSite) -> list[int]:
    """For every head of the query operand the query head that reads it."""
    return [site.query.head_of.index(own) for own in range(site.heads)]


def _turned(
    turn: Rotary | None, columns: Sequence[tuple[int, ...]], before: Sequence[tuple[int, ...]]
) -> Rotary | None:
    """The rotation of what stays: by which columns of the tables every head turns; None if nothing that stays does."""
    if turn is None or not columns[0]:
        return None
    kept = [
        tuple(old[column] for column in own) if old else own
        for own, old in zip(columns, before[: len(columns)], strict=True)
    ]
    return replace(turn, size=len(columns[0]), keep=tuple(kept))


def with_value_latent(site: AttentionSite, mixed_HKK: Array64, rank: int) -> AttentionSite:
    """Values as one latent, read by every head through its own output weights."""
    assert site.output is not None
    weight_HDC = output_weights(site)[:-1].reshape(site.heads, site.v_dim, -1)
    found = merge_values(mixed_HKK, weight_HDC, site.value.head_of, _SWEEPS, rank)
    maps = found.map_KD.reshape(site.value.heads, site.v_dim, rank)
    dtype = site.output.weight_HDC.dtype
    return replace(
        site,
        value=recombined(site.value, together(maps), (0,) * site.heads),
        output=replace(site.output, weight_HDC=found.weight_HDC.astype(dtype)),
    )
