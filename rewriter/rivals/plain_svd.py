"""Low rank from the weights alone: every matrix as the product of two thinner ones, no data, nothing fitted anew.

Within a head the query-key and the value-output products are cut, which saves operations without a further product
(the kindest form of this rival); matrices of feed-forwards become two. Weights stay dense here and hold what is left:
the result is the same, and operations are counted as the two factors would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rewriter.core.site import Array, AttentionSite, FeedForwardSite, Site
from rewriter.rivals.budget import Reduced, Sizes, largest

_LEVELS = tuple(np.linspace(0.05, 1.0, 96))


def plain_svd(sites: Mapping[str, Site], share: float, tokens: int = 128) -> Reduced:
    """The same share of every rank kept at every site, so that at most `share` of the operations is left."""
    sizes = Sizes(sites, tokens)
    factors = {name: _Factors(site) for name, site in sites.items()}

    def reduced(level: float) -> Reduced:
        kept = {name: parts.at(float(level)) for name, parts in factors.items()}
        left = sum(parts.flops(float(level), sizes.flops(parts.site)) for parts in factors.values())
        return Reduced(kept, left / sizes.whole, f"{level:.0%} of every rank")

    found = largest(
        _LEVELS, lambda level: Reduced({}, _share(factors.values(), sizes, float(level)), f"{level}"), share
    )
    return reduced(float(found.detail))


def _share(factors, sizes: Sizes, level: float) -> float:  # type: ignore[no-untyped-def]  # a view of the dictionary
    return sum(parts.flops(level, sizes.flops(parts.site)) for parts in factors) / sizes.whole


class _Factors:
    """The singular vectors of one site's matrices, found once."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._svd: dict[str, tuple[Array, Array, Array]] = {}

    def flops(self, level: float, whole: int) -> float:
        """Operations at a share of the rank."""
        if isinstance(self.site, AttentionSite):
            # Under a rotation or a norm no low-rank product of queries and keys exists: that half stays whole.
            cut = 1.0 if _plain(self.site) else 0.5
            return whole * (1.0 - cut + cut * level)
        if isinstance(self.site, FeedForwardSite):
            rows, columns = self.site.up_CF.shape
            rank = max(1, round(level * min(rows, columns)))
            return whole * min(1.0, rank * (rows + columns) / (rows * columns))
        return whole

    def at(self, level: float) -> Site:
        """The site with that share of its ranks left, in dense weights."""
        site = self.site
        if isinstance(site, FeedForwardSite):
            gate_CF = None if site.gate_CF is None else self._cut("gate_CF", level)
            return replace(site, up_CF=self._cut("up_CF", level), down_FC=self._cut("down_FC", level), gate_CF=gate_CF)
        if not isinstance(site, AttentionSite) or site.output is None or site.value.weight_CGD is None:
            return site
        return _key_query(_value_output(site, level), level)

    def _cut(self, name: str, level: float) -> Array:
        matrix = getattr(self.site, name)
        rows, columns = matrix.shape
        rank = max(1, round(level * min(rows, columns)))
        if rank * (rows + columns) >= rows * columns:
            return np.asarray(matrix)  # two factors would cost more than the matrix
        if name not in self._svd:
            self._svd[name] = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        left, values, right = self._svd[name]
        return np.asarray(((left[:, :rank] * values[:rank]) @ right[:rank]).astype(matrix.dtype))


def _value_output(site: AttentionSite, level: float) -> AttentionSite:
    """Values and outputs at a lower rank of their product, value head by value head, for all heads that read it."""
    assert site.output is not None and site.value.weight_CGD is not None
    rank = max(1, round(level * site.v_dim))
    projectors = np.empty((site.value.heads, site.v_dim, site.v_dim))
    for group in range(site.value.heads):
        members = [head for head in range(site.heads) if site.value.head_of[head] == group]
        joined = np.concatenate([site.output.weight_HDC[head] for head in members], axis=1).astype(np.float64)
        root: Array = np.asarray(np.linalg.qr(site.value.weight_CGD[:, group].astype(np.float64), mode="r"))
        left = np.linalg.svd(root @ joined, full_matrices=False)[0][:, :rank]
        projectors[group] = np.linalg.pinv(root) @ left @ left.T @ root
    weight_HDC = np.stack(
        [projectors[site.value.head_of[head]] @ site.output.weight_HDC[head] for head in range(site.heads)]
    )
    output = replace(site.output, weight_HDC=weight_HDC.astype(site.output.weight_HDC.dtype))
    return replace(site, output=output)


def _key_query(site: AttentionSite, level: float) -> AttentionSite:
    """Queries of each head at a lower rank of their product with its keys; those under a rotation are left."""
    query, key = site.query, site.key
    if not _plain(site) or query.weight_CGD is None or key.weight_CGD is None:
        return site
    rank = max(1, round(level * site.qk_dim))
    weight_CGD, bias_GD = query.weight_CGD.astype(np.float64), query.bias_GD
    bias = None if bias_GD is None else bias_GD.astype(np.float64)
    for head in range(query.heads):
        reader = query.head_of.index(head) if head in query.head_of else head
        root: Array = np.asarray(np.linalg.qr(key.weight_CGD[:, key.head_of[reader]].astype(np.float64), mode="r"))
        own: Array = np.asarray(np.linalg.qr(weight_CGD[:, head], mode="r"))
        right = np.linalg.svd(own @ root.T, full_matrices=False)[2][:rank]
        # Queries projected onto what the strongest directions of the keys can see.
        projector = root.T @ right.T @ right @ np.linalg.pinv(root.T)
        weight_CGD[:, head] = weight_CGD[:, head] @ projector
        if bias is not None:
            bias[head] = bias[head] @ projector
    dtype = query.weight_CGD.dtype
    cut = replace(query, weight_CGD=weight_CGD.astype(dtype), bias_GD=None if bias is None else bias.astype(dtype))
    return replace(site, query=cut)


def _plain(site: AttentionSite) -> bool:
    return site.query.plain and site.key.plain
