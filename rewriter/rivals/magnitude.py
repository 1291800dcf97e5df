"""Uniform pruning by the size of weights: the same share of heads and hidden units everywhere, nothing fitted anew.

A head's size is the norm of its value and output weights together, a unit's the product of the norms of what goes in
and what comes out. Source: Han et al. 2015 (magnitude), applied to whole heads and units.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.rivals.budget import Reduced, Sizes, largest

_LEVELS = tuple(np.linspace(0.05, 1.0, 96))


def magnitude(sites: Mapping[str, Site], share: float, tokens: int = 128) -> Reduced:
    """Heads and units of least magnitude removed from every site, until at most `share` of the operations is left."""
    sizes = Sizes(sites, tokens)
    orders = {name: _order(site) for name, site in sites.items()}

    def reduced(level: float) -> Reduced:
        kept = {name: _cut(site, orders[name], float(level)) for name, site in sites.items()}
        return Reduced(kept, sizes.share(kept), f"{level:.0%} of heads and units")

    return largest(_LEVELS, reduced, share)


def head_sizes(site: AttentionSite) -> np.ndarray:
    """(H,) norms of value times output weights, zero where either is not known."""
    if site.output is None or site.value.weight_CGD is None:
        return np.zeros(site.heads)
    products = (
        site.value.weight_CGD[:, site.value.head_of[head]].astype(np.float64) @ site.output.weight_HDC[head]
        for head in range(site.heads)
    )
    return np.array([np.linalg.norm(product) for product in products])


def unit_sizes(site: FeedForwardSite) -> np.ndarray:
    """(F,) products of the norms of a hidden unit's weights."""
    into = np.linalg.norm(site.up_CF.astype(np.float64), axis=0)
    if site.gate_CF is not None:
        into = into * np.linalg.norm(site.gate_CF.astype(np.float64), axis=0)
    return np.asarray(into * np.linalg.norm(site.down_FC.astype(np.float64), axis=1))


def _order(site: Site) -> np.ndarray:
    """Heads (in groups that share keys, whole groups) or units, the largest first."""
    if isinstance(site, FeedForwardSite):
        return np.argsort(-unit_sizes(site), kind="stable")
    if not isinstance(site, AttentionSite):
        return np.zeros(0, np.intp)
    sizes, group_of = head_sizes(site), np.array(site.key.head_of)
    groups = np.array([sizes[group_of == group].sum() for group in range(site.kv_heads)])
    return np.argsort(-groups, kind="stable")


def _cut(site: Site, order: np.ndarray, level: float) -> Site:
    count = max(1, round(level * len(order)))
    if isinstance(site, FeedForwardSite):
        return site.keep_units(tuple(sorted(int(unit) for unit in order[:count])))
    if not isinstance(site, AttentionSite):
        return site
    groups = set(order[:count].tolist())
    return site.keep_heads(tuple(head for head in range(site.heads) if site.key.head_of[head] in groups))
