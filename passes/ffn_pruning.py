"""Remove hidden units of a feed-forward by optimal brain surgeon on its output matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.memo import IdentityMemo
from rewriter.core.obs import Elimination, Index, RidgeProblem, improve_columns
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import (
    RIDGE,
    Pass,
    feed_forward_input,
    feed_forward_refusal,
    out_of_range,
    output_weights,
    with_output_weights,
)
from rewriter.core.site import Array, FeedForwardSite, Site
from rewriter.core.statistics import FeedForwardStatistics, Statistics
from rewriter.core.target import Target

_STEP = 16  # units removed between two scorings: the sweep costs width / step down-dates instead of width
_MOST_LEVELS = 12


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The order in which units leave, first the least missed, and the loss after each step (by units left)."""

    problem: RidgeProblem
    order: Index
    losses: Mapping[int, float]
    improved: dict[int, Index] = field(default_factory=dict)  # by width: what swaps made of the order's choice


@dataclass(frozen=True)
class FfnPruning(Pass):
    """Keep the hidden units that the output misses most, and let them take over the rest.

    What it does
        Cuts units out of the up (and gate) projection and the matching rows of the down projection, which is refitted
        with its bias on what stays. ``width`` is the number of units kept. What the sweep leaves of a level is improved
        by swaps while the loss falls.
    When it applies
        To every lowerable feed-forward, plain or gated, whose hidden values nothing outside reads.
    Exact or calibrated
        Calibrated; exact when the removed units were idle or constant (the bias takes those over).
    What it costs
        One inverse of width^2 and width/16 down-dates per layer, and a few factorisations per level: about two seconds
        for width 1,536.
    Before and after
        384 -> 1536 -> 384 becomes 384 -> 1024 -> 384 by ``ffn_pruning{width=1024}``: a third less of both GEMMs.
    Source
        Hassibi and Stork 1993 (OBS); structured and one-sweep forms as in ZipLM, Kurtic et al. 2023; swaps
        as in OSSCAR, Meng et al. 2024, here many at once.
    """

    name: ClassVar[str] = "ffn_pruning"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 40

    _sweeps: ClassVar[IdentityMemo[_Sweep]] = IdentityMemo()

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = feed_forward_refusal(site)
        if refusal is not None or not isinstance(site, FeedForwardSite):
            return refusal
        if site.width < 32:
            return Refusal("too-narrow", f"{site.width} hidden units leave nothing to gain")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Multiples of 64 or more (of the vector width, for narrow blocks) from 7/8 of the width to 1/4."""
        if self.refuse(site) is not None or not isinstance(site, FeedForwardSite):
            return ()
        step = 64 if site.width >= 512 else max(8, min(target.vector_floats, 16))
        while (site.width * 7 // 8 - site.width // 4) // step + 1 > _MOST_LEVELS:
            step *= 2
        lowest = -(-site.width // 4 // step) * step
        widths = range(site.width * 7 // 8 // step * step, max(lowest, step) - 1, -step)
        return tuple(Option.of(self.name, site.id, width=width) for width in widths)

    def losses(self, site: Site, statistics: Statistics) -> Mapping[Option, float]:
        """See `Pass.losses`: after every step of the sweep and before swaps, including the ridge penalty."""
        if self.refuse(site) is not None:
            return {}
        losses = self._sweep(site, statistics).losses
        return {Option.of(self.name, site.id, width=width): loss for width, loss in losses.items()}

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """The kept units."""
        own, facts = feed_forward_input(self.refuse(site), site, option, statistics)
        return self._kept(own, option, facts)

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = feed_forward_input(self.refuse(site), site, option, statistics)
        kept = self._kept(own, option, facts)
        if len(kept) == own.width:
            return own
        weights = self._sweep(own, facts).problem.solve(kept)
        return with_output_weights(own.keep_units(tuple(int(unit) for unit in kept)), weights)

    def _kept(self, site: FeedForwardSite, option: Option, statistics: FeedForwardStatistics) -> Index:
        width = option.integer("width")
        if not 1 <= width <= site.width:
            raise out_of_range(option, "width", 1, site.width)
        if width == site.width:
            return np.arange(width)
        sweep = self._sweep(site, statistics)
        if width not in sweep.improved:
            sweep.improved[width] = improve_columns(sweep.problem, sweep.order[site.width - width :])
        return sweep.improved[width]

    def _sweep(self, site: Site, statistics: Statistics) -> _Sweep:
        assert isinstance(site, FeedForwardSite) and isinstance(statistics, FeedForwardStatistics)
        return self._sweeps.get((site, statistics), lambda: _sweep(site, statistics))


def _sweep(site: FeedForwardSite, statistics: FeedForwardStatistics) -> _Sweep:
    problem = RidgeProblem.of(statistics.hidden, output_weights(site), RIDGE)
    elimination = Elimination(problem, np.arange(site.width)[:, None])
    order: list[int] = []
    loss = problem.loss(np.arange(site.width))
    losses = {}
    while len(elimination.alive) > 1:
        count = min(_STEP, max(1, len(elimination.alive) // 8))
        ranked = np.argsort(elimination.scores(), kind="stable")[:count]
        gone = elimination.alive[ranked]
        loss += elimination.remove(gone)
        order.extend(int(unit) for unit in gone)
        losses[len(elimination.alive)] = loss
    return _Sweep(problem, np.array([*order, *(int(unit) for unit in elimination.alive)], dtype=np.intp), losses)
