"""Remove attention heads by optimal brain surgeon on the output projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.memo import IdentityMemo
from rewriter.core.obs import Elimination, Index, RidgeProblem, improve
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
from rewriter.core.statistics import AttentionStatistics, Statistics
from rewriter.core.target import Target


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The heads to keep and the loss, for every option of one site."""

    problem: RidgeProblem
    kept: Mapping[Option, tuple[int, ...]]
    losses: Mapping[Option, float]


@dataclass(frozen=True)
class HeadPruning(Pass):
    """Keep the heads that the output misses most, and let the remaining ones take over the rest.

    What it does
        Cuts heads out of W_q, W_k, W_v and W_o, and refits W_o and its bias on the heads that stay. Heads are removed
        one by one, cheapest first, then swapped while the loss falls. ``keep`` counts query heads. In grouped-query
        attention whole key/value groups go; with ``per_group`` every group keeps that many query heads.
    When it applies
        Every operand's weights are known, nothing inside is read from outside, no cache is in the signature, and all
        key/value groups have the same size.
    Exact or calibrated
        Calibrated; exact when the removed heads were idle.
    What it costs
        One inverse of (heads x head dim)^2 and a few solves per level, milliseconds to seconds per layer.
    Before and after
        12 heads x 32 -> ``head_pruning{keep=8}`` -> 8 heads x 32: a third less of projections, scores and mixing.
    Source
        Hassibi and Stork 1993 (OBS); block form with swaps as in OSSCAR, Meng et al. 2024; levels in one sweep as in
        ZipLM, Kurtic et al. 2023.
    """

    name: ClassVar[str] = "head_pruning"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 10

    _sweeps: ClassVar[IdentityMemo[_Sweep]] = IdentityMemo()

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        if site.heads < 2:
            return Refusal("one-head", "there is a single head")
        if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
            return Refusal("shared-query-heads", "query heads are shared, so they cannot be cut one by one")
        if any(operand.norm is not None and operand.norm.across_heads for operand in (site.query, site.key)):
            return Refusal("norm-across-heads", "a norm over all heads together depends on every one of them")
        if _groups(site) is None:
            return Refusal("uneven-groups", "keys and values are shared by groups of different sizes or members")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Every number of heads; in grouped-query attention of groups, and of query heads per group."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        return _levels(site)

    def losses(self, site: Site, statistics: Statistics) -> Mapping[Option, float]:
        """See `Pass.losses`; includes the ridge penalty."""
        if self.refuse(site) is not None:
            return {}
        return dict(_sweep_of(site, statistics, self._sweeps).losses)

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """The columns of the kept heads."""
        own, _ = attention_input(self.refuse(site), site, option, statistics)
        return _columns(own)[list(self._kept(own, option, statistics))].reshape(-1)

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        kept = self._kept(own, option, facts)
        if len(kept) == own.heads:
            return own
        weights = _sweep_of(own, facts, self._sweeps).problem.solve(_columns(own)[list(kept)].reshape(-1))
        return with_output_weights(own.keep_heads(kept), weights)

    def _kept(self, site: AttentionSite, option: Option, statistics: Statistics) -> tuple[int, ...]:
        if option.integer("keep") == site.heads:
            return tuple(range(site.heads))
        plain = Option(self.name, option.parameters, site.id)
        kept = _sweep_of(site, statistics, self._sweeps).kept
        if plain not in kept:
            raise out_of_range(option, "keep", 1, site.heads)
        return kept[plain]


def _groups(site: AttentionSite) -> Index | None:
    """Query heads by the key/value heads they share, (groups, heads per group); None if that is no rectangle."""
    members: dict[tuple[int, int], list[int]] = {}
    for head in range(site.heads):
        members.setdefault((site.key.head_of[head], site.value.head_of[head]), []).append(head)
    apart = len({key for key, _ in members}) == len(members) == len({value for _, value in members})
    if not apart or len({len(heads) for heads in members.values()}) != 1:
        return None
    return np.array(list(members.values()), dtype=np.intp)


def _levels(site: AttentionSite) -> tuple[Option, ...]:
    groups = _groups(site)
    assert groups is not None
    count, size = groups.shape
    whole = [Option.of("head_pruning", site.id, keep=size * left) for left in range(count - 1, 0, -1)]
    thinner = [Option.of("head_pruning", site.id, keep=count * left, per_group=left) for left in range(size - 1, 0, -1)]
    return tuple(sorted(whole + thinner, key=lambda option: -option.integer("keep")))


def _columns(site: AttentionSite) -> Index:
    """Feature columns of every query head, (heads, head dim)."""
    return np.arange(site.heads * site.v_dim, dtype=np.intp).reshape(site.heads, site.v_dim)


def _sweep_of(site: Site, statistics: Statistics, memo: IdentityMemo[_Sweep]) -> _Sweep:
    assert isinstance(site, AttentionSite) and isinstance(statistics, AttentionStatistics)
    return memo.get((site, statistics), lambda: _sweep(site, statistics))


def _sweep(site: AttentionSite, statistics: AttentionStatistics) -> _Sweep:
    problem = RidgeProblem.of(statistics.features, output_weights(site), RIDGE)
    groups = _groups(site)
    assert groups is not None
    kept = dict(_whole_groups(site, problem, groups))
    kept.update(_per_group(site, problem, groups))
    columns = _columns(site)
    losses = {option: problem.loss(columns[list(heads)].reshape(-1)) for option, heads in kept.items()}
    return _Sweep(problem, kept, losses)


def _whole_groups(site: AttentionSite, problem: RidgeProblem, groups: Index) -> list[tuple[Option, tuple[int, ...]]]:
    """Groups removed one by one, cheapest first, each level then improved by swaps."""
    blocks = _columns(site)[groups].reshape(len(groups), -1)
    elimination = Elimination(problem, blocks)
    found = []
    while len(elimination.alive) > 1:
        elimination.remove(elimination.alive[[int(np.argmin(elimination.scores()))]])
        left = improve(problem, blocks, tuple(int(block) for block in elimination.alive))
        heads = tuple(sorted(int(head) for head in groups[list(left)].reshape(-1)))
        found.append((Option.of("head_pruning", site.id, keep=len(heads)), heads))
    return found


def _per_group(site: AttentionSite, problem: RidgeProblem, groups: Index) -> list[tuple[Option, tuple[int, ...]]]:
    """The cheapest query head of every group removed in turn, so that groups keep equal sizes."""
    elimination = Elimination(problem, _columns(site))
    found = []
    for size in range(groups.shape[1] - 1, 0, -1):
        for members in groups:
            candidates = np.isin(elimination.alive, members)
            scores = np.where(candidates, elimination.scores(), np.inf)
            elimination.remove(elimination.alive[[int(np.argmin(scores))]])
        heads = tuple(sorted(int(head) for head in elimination.alive))
        found.append((Option.of("head_pruning", site.id, keep=len(heads), per_group=size), heads))
    return found
