"""Compute an attention in one kernel or operator of a runtime, or step by step: what is fastest there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rewriter.core.errors import OptionError
from rewriter.core.forms import ATTENTION, EVERY_FORM, GROUP_QUERY, MULTI_HEAD, PACKED
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_refusal
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target


@dataclass(frozen=True)
class FusedSdpa(Pass):
    """Choose the form in which a runtime computes scaled dot-product attention.

    What it does
        Names a form: ``flash`` (the kernel of the TVM engine), ``attention`` (the operator of ONNX, opset 23),
        ``multi_head_attention``, ``packed_attention`` and ``group_query_attention`` (of com.microsoft), ``sdpa``
        (torch), or ``decomposed``. A runtime takes the form that it has; a site may name one for each runtime.
    When it applies
        Attentions that may be written anew, with a cache or without. Which operators can say what a site does is
        decided when it is written; a search compares each with the decomposed form, on hostile masks, in the runtime.
    Exact or calibrated
        Exact but for the order in which numbers are added; chosen by time.
    What it costs
        Nothing to apply. ``attention`` writes the whole graph at opset 23, operators of com.microsoft need a runtime
        that has them.
    Before and after
        ``MatMul, Add, Softmax, MatMul`` and six transposes and reshapes -> ``Attention``.
    Source
        Attention without the whole score matrix: Dao et al. 2022 (FlashAttention).
    """

    name: ClassVar[str] = "fused_sdpa"
    kind: ClassVar[Literal["exact", "calibrated"]] = "exact"
    order: ClassVar[int] = 95
    combines: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`; a cache is no hindrance."""
        refusal = attention_refusal(site)
        return None if refusal is not None and refusal.code == "cache-in-signature" else refusal

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """All forms that could mean the same; runtimes leave out those they do not have."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        return tuple(Option.of(self.name, site.id, form=form) for form in EVERY_FORM if _possible(form, site))

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; needs no statistics. The latest choice goes before earlier ones for the same runtime."""
        refusal = self.refuse(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            raise OptionError(f"{option} does not apply: {refusal.why if refusal else ''}", "Leave the option out")
        form = dict(option.parameters).get("form")
        if form not in EVERY_FORM:
            raise OptionError(f"{option} names no form of attention", f"Write form={' or form='.join(EVERY_FORM)}")
        return replace(site, forms=(str(form), *(other for other in site.forms if other != form)))


def _possible(form: str, site: AttentionSite) -> bool:
    """Whether an operator could say what the site does, as far as its description tells."""
    if form in (ATTENTION, MULTI_HEAD, PACKED, GROUP_QUERY) and (site.sink_H is not None or site.bias.kept[1]):
        return False
    if form in (MULTI_HEAD, PACKED) and site.softcap:
        return False
    if form == GROUP_QUERY:
        return site.causal and not site.cross and not site.cached and site.qk_dim == site.v_dim
    parts = (site.query, site.key, site.value)
    plain = all(part.weight_CGD is not None and part.norm is None and part.rotary is None for part in parts)
    return form != PACKED or (plain and len({part.source for part in parts}) == 1)
