"""Remove what an attention computes without effect: key bias, value bias, scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_refusal
from rewriter.core.site import Array, AttentionSite, Projection, Site
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target


@dataclass(frozen=True)
class ExactCleanup(Pass):
    """Drop the key bias, fold the value bias into the output bias, fold the scale into the queries.

    What it does
        1. The key bias adds ``q . b_k`` to every score of a row, which softmax ignores: it goes.
        2. Rows of probabilities sum to one, so the value bias adds ``sum_h b_v,h W_o,h`` to every output: it moves.
        3. ``scale * (x W_q + b_q)`` is a projection by scaled weights: the scale becomes 1.
    When it applies
        1. Keys are a bare projection (a rotation or norm would make the bias depend on position or content) and no
           soft-cap bends the scores.
        2. Values are a bare projection and no row of probabilities can be zero: not with a mask whose empty rows give
           zero.
        3. No norm stands between the query projection and the scores, since it would swallow the factor.
        Never with values read from outside or a cache in the signature.
    Exact or calibrated
        Exact in real arithmetic; weights are rounded once.
    What it costs
        Nothing.
    Before and after
        ``x W_k + b_k`` -> ``x W_k``; ``x W_v + b_v`` -> ``x W_v``; scores ``0.177 * q . k`` -> ``q . k``.
    Source
        Elementary identities of softmax attention (Vaswani et al. 2017); tested by counter-example.
    """

    name: ClassVar[str] = "exact_cleanup"
    kind: ClassVar[Literal["exact", "calibrated"]] = "exact"
    order: ClassVar[int] = 1

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`; also when there is nothing to clean up."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        reasons = (key_bias_refusal(site), value_bias_refusal(site), scale_refusal(site))
        if None in reasons:
            return None
        telling = [reason for reason in reasons if reason is not None and reason.code != "nothing-to-do"]
        return telling[0] if telling else Refusal("nothing-to-do", "no idle bias and no scale left")

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """One option, which does all that is possible; none if nothing is."""
        return () if self.refuse(site) is not None else (Option.of(self.name, site.id),)

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; needs no statistics."""
        refusal = self.refuse(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            why = refusal.why if refusal else "not an attention"
            raise OptionError(f"{option} does not apply: {why}", "Leave the option out of the plan")
        cleaned = site
        if key_bias_refusal(site) is None:
            cleaned = replace(cleaned, key=replace(cleaned.key, bias_GD=None))
        if value_bias_refusal(site) is None:
            cleaned = _fold_value_bias(cleaned)
        if scale_refusal(site) is None:
            cleaned = replace(cleaned, query=_scaled(cleaned.query, cleaned.scale), scale=1.0)
        return cleaned


def key_bias_refusal(site: AttentionSite) -> Refusal | None:
    """Why the key bias matters, or None if it is idle."""
    if site.key.bias_GD is None:
        return Refusal("nothing-to-do", "keys have no bias")
    if site.softcap:
        return Refusal("soft-cap", "a soft-cap bends what the key bias adds to all scores of a row")
    if site.sink_H is not None or site.bias.kept[1]:
        return Refusal("not-all-scores", "some scores of a row are made without the keys, and the key bias misses them")
    if not site.key.plain:
        return Refusal("key-not-plain", "a norm or rotation after the key bias makes it depend on content or position")
    return None


def value_bias_refusal(site: AttentionSite) -> Refusal | None:
    """Why the value bias may not move into the output bias, or None."""
    if site.value.bias_GD is None:
        return Refusal("nothing-to-do", "values have no bias")
    if not site.value.plain:
        return Refusal("value-not-plain", "a norm or rotation follows the value bias")
    if site.sink_H is not None:
        return Refusal("sink", "attention on the sink is lost, so that rows do not sum to one")
    if site.empty_rows == "zero" and site.bias.kind != "none":
        return Refusal("empty-rows", "queries without any allowed key give zero here, and would give the bias instead")
    return None


def scale_refusal(site: AttentionSite) -> Refusal | None:
    """Why the scale may not move into the query projection, or None."""
    if site.scale == 1.0:
        return Refusal("nothing-to-do", "there is no scale")
    if site.query.norm is not None:
        return Refusal("head-norm", "a norm of the queries would swallow the scale")
    return None


def _fold_value_bias(site: AttentionSite) -> AttentionSite:
    assert site.value.bias_GD is not None and site.output is not None
    bias_HD = site.value.bias_GD[list(site.value.head_of)].astype(np.float64)
    added = np.einsum("hd,hdc->c", bias_HD, site.output.weight_HDC.astype(np.float64))
    before = 0.0 if site.output.bias_C is None else site.output.bias_C.astype(np.float64)
    bias_C = (before + added).astype(site.output.weight_HDC.dtype)
    return replace(site, value=replace(site.value, bias_GD=None), output=replace(site.output, bias_C=bias_C))


def _scaled(query: Projection, scale: float) -> Projection:
    def times(array: Array | None) -> Array | None:
        return None if array is None else (array.astype(np.float64) * scale).astype(array.dtype)

    return replace(query, weight_CGD=times(query.weight_CGD), bias_GD=times(query.bias_GD))
