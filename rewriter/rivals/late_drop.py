"""Attention of the last layers left out: what LLM-Drop found to hurt least when nothing is fitted anew.

Source: He et al. 2024, "What matters in transformers? Not all attention is needed". The last layer itself goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rewriter.core.site import AttentionSite, LinearSite, Site
from rewriter.rivals.budget import Reduced, Sizes


def late_drop(sites: Mapping[str, Site], share: float, tokens: int = 128) -> Reduced:
    """Without the attention of as few last layers as bring the operations to `share`, or of all if none do."""
    sizes = Sizes(sites, tokens)
    late = sorted(
        (
            site
            for site in sites.values()
            if isinstance(site, AttentionSite) and site.output is not None and not site.cached
        ),
        key=lambda site: -site.order,
    )
    kept, dropped = dict(sites), 0
    for site in late:
        if sizes.share(kept) <= share + 1e-9:
            break
        kept[site.id] = without(site)
        dropped += 1
    return Reduced(kept, sizes.share(kept), f"{dropped} of {len(late)} attentions left out")


def without(site: AttentionSite) -> LinearSite:
    """Nothing in an attention's place: the residual stream passes by."""
    assert site.output is not None
    bare = replace(site.value, weight_CGD=None, bias_GD=None, head_of=(0,), weight_name="", bias_name="")
    columns, dtype = site.output.weight_HDC.shape[2], site.output.weight_HDC.dtype
    output = replace(site.output, weight_HDC=np.zeros((0, 0, columns), dtype), bias_C=None)
    return LinearSite(site.id, bare, output, site)
