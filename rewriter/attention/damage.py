"""Wrong variants of a site. A comparison that does not notice them proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from rewriter.core.site import Array, AttentionSite, FeedForwardSite, Projection, RaisedSite, ScoreBias


def without_a_part(site: RaisedSite) -> RaisedSite:
    """The site without some head, or without a quarter of its hidden units: by views of its weights where possible."""
    if isinstance(site, AttentionSite):
        assert site.output is not None
        if _in_order(site):
            return _without_last_group(site)
        weight_HDC = site.output.weight_HDC.copy()
        weight_HDC[0] = 0
        return replace(site, output=replace(site.output, weight_HDC=weight_HDC))
    first = max(1, site.width // 4)
    if site.activation == "path":  # its nodes may name the width
        down_FC = site.down_FC.copy()
        down_FC[:first] = 0
        return replace(site, down_FC=down_FC)

    def cut(array: Array | None) -> Array | None:
        return None if array is None else array[..., first:]

    return replace(
        site,
        up_CF=site.up_CF[:, first:],
        up_bias_F=cut(site.up_bias_F),
        gate_CF=cut(site.gate_CF),
        gate_bias_F=cut(site.gate_bias_F),
        down_FC=site.down_FC[first:],
    )


def _in_order(site: AttentionSite) -> bool:
    """Whether the last group of heads can be cut off all weights by a slice."""
    operands, groups = (site.query, site.key, site.value), site.value.heads
    if site.output is None or site.output.apart or site.output.bare or site.before or site.after:
        return False
    if groups < 2 or site.heads % groups or any(not p.mapped or p.past or p.present or p.norm for p in operands):
        return False
    order = tuple(head * groups // site.heads for head in range(site.heads))
    return site.key.head_of == site.value.head_of == order and site.query.head_of == tuple(range(site.heads))


def _without_last_group(site: AttentionSite) -> AttentionSite:
    left = site.heads - site.heads // site.value.heads
    assert site.output is not None

    def cut(p: Projection, heads: int) -> Projection:
        assert p.weight_CGD is not None
        bias_GD = None if p.bias_GD is None else p.bias_GD[:heads]
        return replace(p, weight_CGD=p.weight_CGD[:, :heads], bias_GD=bias_GD, head_of=p.head_of[:left])

    return replace(
        site,
        heads=left,
        query=cut(site.query, left),
        key=cut(site.key, site.value.heads - 1),
        value=cut(site.value, site.value.heads - 1),
        bias=site.bias.keep_heads(tuple(range(left))),
        output=replace(site.output, weight_HDC=site.output.weight_HDC[:left]),
    )


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
        query, key = (
            replace(p, rotary=replace(p.rotary, sign=-p.rotary.sign)) if p.rotary else p for p in (site.query, site.key)
        )
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
