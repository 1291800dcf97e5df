"""Wrong variants of a site. A comparison that does not notice them proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from rewriter.core.site import AttentionSite, FeedForwardSite, RaisedSite, ScoreBias


def without_a_part(site: RaisedSite) -> RaisedSite:
    """The site without its first head, or without a quarter of its hidden units."""
    if isinstance(site, AttentionSite):
        assert site.output is not None
        weight_HDC = site.output.weight_HDC.copy()
        weight_HDC[0] = 0
        return replace(site, output=replace(site.output, weight_HDC=weight_HDC))
    kept = slice(max(1, site.width // 4), None)
    cut = {"up_CF": site.up_CF[:, kept], "down_FC": site.down_FC[kept]}
    if site.up_bias_F is not None:
        cut["up_bias_F"] = site.up_bias_F[kept]
    if site.gate_CF is not None:
        cut["gate_CF"] = site.gate_CF[:, kept]
    if site.gate_bias_F is not None:
        cut["gate_bias_F"] = site.gate_bias_F[kept]
    if site.activation == "path":  # its nodes may name the width
        down_FC = site.down_FC.copy()
        down_FC[: max(1, site.width // 4)] = 0
        cut = {"down_FC": down_FC}
    return replace(site, **cut)


def wrong_variants(site: RaisedSite) -> Iterator[tuple[str, RaisedSite]]:
    """What was done, and the site it was done to: once for every claim that the numbers of a run could contradict."""
    part = "one head" if isinstance(site, AttentionSite) else "some hidden units"
    yield f"zeroing {part}", without_a_part(site)
    if isinstance(site, FeedForwardSite):
        return
    if site.example_shape[2] != 1:  # over a single key, softmax is one whatever the score
        yield "halving the scale", replace(site, scale=0.5 * site.scale)
    if not site.bias.nothing:
        yield "dropping what is added to the scores", replace(site, bias=ScoreBias())
    if site.softcap:
        yield "dropping the soft-cap", replace(site, softcap=0.0)
    if site.query.rotary is not None and site.key.rotary is not None:
        query, key = (replace(p, rotary=replace(p.rotary, sign=-p.rotary.sign)) for p in (site.query, site.key))
        yield "rotating the other way", replace(site, query=query, key=key)
    for role in ("query", "key"):
        norm = getattr(site, role).norm
        if norm is not None:
            uneven = float(np.ptp(norm.gain_D, axis=-1).max()) > 1e-6 * float(np.abs(norm.gain_D).max())
            wrong = replace(norm, gain_D=np.roll(norm.gain_D, 1, -1) if uneven else 2 * norm.gain_D)
            yield (
                f"moving the gains of the {role} norm",
                replace(site, **{role: replace(getattr(site, role), norm=wrong)}),
            )
