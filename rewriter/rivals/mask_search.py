"""Kwon et al. 2022: which heads and units to keep for a number of operations, by the Fisher information of masks alone.

For every number of heads the units that fill the budget are taken, and the pair that keeps most Fisher information
wins; then masks of a layer are rearranged to lower the quadratic form of its own Fisher matrix. Weights are not fitted
anew and masks not tuned. Source: "A fast post-training pruning framework for transformers"; written from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.rivals.budget import Reduced, Sizes
from rewriter.rivals.late_drop import without

_SWAPS = 200


def mask_search(
    sites: Mapping[str, Site],
    diagonal: Mapping[str, np.ndarray],
    matrix: Mapping[str, np.ndarray],
    share: float,
    tokens: int = 128,
) -> Reduced:
    """The best masks for `share` of the operations. `diagonal` and `matrix` are what `rivals.fisher` gives."""
    sizes = Sizes(sites, tokens)
    heads, units = _ranked(sites, diagonal, AttentionSite), _ranked(sites, diagonal, FeedForwardSite)
    prices = {name: _price(site, sizes) for name, site in sites.items()}
    head_count, unit_count = _split(heads, units, prices, share * sizes.whole)
    chosen: dict[str, list[int]] = {name: [] for name in sites}
    for _, name, index in [*heads[:head_count], *units[:unit_count]]:
        chosen[name].append(index)
    kept = {name: _kept(site, chosen[name], diagonal, matrix) for name, site in sites.items()}
    return Reduced(kept, sizes.share(kept), f"{head_count} heads and {unit_count} units in all")


def _ranked(
    sites: Mapping[str, Site], diagonal: Mapping[str, np.ndarray], kind: type[AttentionSite] | type[FeedForwardSite]
) -> list[tuple[float, str, int]]:
    """Every head (or unit) of all layers, the most important first."""
    found = [
        (float(value), name, index)
        for name, site in sites.items()
        if isinstance(site, kind)
        for index, value in enumerate(diagonal[name])
    ]
    return sorted(found, key=lambda one: (-one[0], one[1], one[2]))


def _price(site: Site, sizes: Sizes) -> float:
    count = site.heads if isinstance(site, AttentionSite) else site.width if isinstance(site, FeedForwardSite) else 1
    return sizes.flops(site) / max(count, 1)


def _split(
    heads: list[tuple[float, str, int]],
    units: list[tuple[float, str, int]],
    prices: Mapping[str, float],
    budget: float,
) -> tuple[int, int]:
    """How many of the best heads and of the best units to keep."""
    unit_costs = np.cumsum([0.0] + [prices[name] for _, name, _ in units])
    unit_worth = np.cumsum([0.0] + [value for value, _, _ in units])
    best, found, spent, worth = -1.0, (0, 0), 0.0, 0.0
    for count in range(len(heads) + 1):
        if count:
            spent += prices[heads[count - 1][1]]
            worth += heads[count - 1][0]
        if spent > budget:
            break
        filling = int(np.searchsorted(unit_costs, budget - spent, side="right")) - 1
        if worth + unit_worth[filling] > best:
            best, found = worth + float(unit_worth[filling]), (count, filling)
    return found


def _kept(site: Site, chosen: list[int], diagonal: Mapping[str, np.ndarray], matrix: Mapping[str, np.ndarray]) -> Site:
    """The site with as many heads or units as were chosen, rearranged; an attention without any goes, a unit stays."""
    if isinstance(site, FeedForwardSite):
        rows = chosen or [int(np.argmax(diagonal[site.id]))]
        return site.keep_units(tuple(rearranged(rows, matrix[site.id])))
    if not isinstance(site, AttentionSite) or site.output is None:
        return site
    return site.keep_heads(tuple(rearranged(chosen, matrix[site.id]))) if chosen else without(site)


def rearranged(chosen: list[int], matrix: np.ndarray) -> list[int]:
    """As many rows, after the swaps that most lower ``m^T F m``, where m is one for what is removed."""
    removed = np.ones(len(matrix), bool)
    removed[chosen] = False
    for _ in range(_SWAPS):
        inside, outside = np.flatnonzero(removed), np.flatnonzero(~removed)
        if not len(inside) or not len(outside):
            break
        pull = matrix @ removed.astype(np.float64)
        diagonal = np.diagonal(matrix)
        # Taking o back in place of i: change of the form when i leaves what is removed and o joins it.
        change = (
            (-2 * pull[inside] + diagonal[inside])[:, None]
            + (2 * pull[outside] + diagonal[outside])[None]
            - 2 * matrix[np.ix_(inside, outside)]
        )
        best = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[best] >= -1e-12 * max(float(np.trace(matrix)), 1e-30):
            break
        removed[inside[best[0]]], removed[outside[best[1]]] = False, True
    return [int(index) for index in np.flatnonzero(~removed)]
