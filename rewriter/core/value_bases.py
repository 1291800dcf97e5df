"""The dims of every value head in the order in which the output misses them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from rewriter.core.linalg import cholesky_upper, ridge_towards
from rewriter.core.rewrite import RIDGE, output_weights
from rewriter.core.site import AttentionSite
from rewriter.core.statistics import Array64, AttentionStatistics

_RIDGE = 1e-6  # only makes the factorisation succeed; it cancels at full rank


@dataclass(frozen=True, eq=False)
class ValueBases:
    """Per value head G: the map of a value (D, D), best of every rank first, and its inverse."""

    map_GDD: Array64
    inverse_GDD: Array64

    def blocks(self, site: AttentionSite, rank: int) -> Array64:
        """How features change at a rank: block-diagonal, (H*D, H*rank)."""
        return np.asarray(linalg.block_diag(*(self.map_GDD[group, :, :rank] for group in site.value.head_of)))

    def refit(self, site: AttentionSite, statistics: AttentionStatistics, rank: int) -> Array64:
        """All output weights jointly, pulled towards what truncation leaves of the present ones."""
        weights = output_weights(site)
        width = weights.shape[1]
        weight_HDC = weights[:-1].reshape(site.heads, site.v_dim, width)
        inverse_HRD = self.inverse_GDD[list(site.value.head_of), :rank]
        current = np.vstack([(inverse_HRD @ weight_HDC).reshape(-1, width), weights[-1:]])
        return ridge_towards(statistics.features.map(self.blocks(site, rank)), current, RIDGE)


def value_bases(site: AttentionSite, statistics: AttentionStatistics) -> ValueBases:
    """``R [W_o of the group] = U S V'`` with ``R'R`` the centred Gram of the group's results; the map is ``R^-1 U``."""
    dim, regression = site.v_dim, statistics.features
    mean = regression.gram[-1, :-1]
    centred = regression.gram[:-1, :-1] - np.outer(mean, mean) / max(regression.tokens, 1)
    weight_HDC = output_weights(site)[:-1].reshape(site.heads, dim, -1)
    map_GDD, inverse_GDD = np.empty((site.value.heads, dim, dim)), np.empty((site.value.heads, dim, dim))
    for group in range(site.value.heads):
        members = [head for head in range(site.heads) if site.value.head_of[head] == group]
        blocks = [slice(head * dim, (head + 1) * dim) for head in members]
        gram = np.sum([centred[block, block] for block in blocks], axis=0) if members else np.zeros((dim, dim))
        energy = float(np.trace(gram)) / dim
        if energy <= 0.0:
            map_GDD[group] = inverse_GDD[group] = np.eye(dim)
            continue
        root = cholesky_upper(gram, _RIDGE)
        product = root @ np.concatenate([weight_HDC[head] for head in members], axis=1)
        left = np.linalg.svd(product, full_matrices=product.shape[1] < dim)[0]
        map_GDD[group] = linalg.solve_triangular(root, left) * np.sqrt(energy)  # results keep their scale
        inverse_GDD[group] = left.T @ root / np.sqrt(energy)
    return ValueBases(map_GDD, inverse_GDD)
