"""One matrix product for queries, keys and values, or for keys and values, or three again: what is fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_refusal
from rewriter.core.site import AttentionSite, Projection, Site
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target


@dataclass(frozen=True)
class QkvPacking(Pass):
    """Write the projections of one source as a single product that is split afterwards.

    What it does
        ``pack=qkv`` puts the weights of all three projections side by side, ``pack=kv`` those of keys and values;
        ``pack=none`` takes them apart, also where the model has them packed.
    When it applies
        Projections with known weights that read one value in one layout, as many queries as keys for ``qkv``. The TVM
        engine packs by itself and needs no option; other runtimes do as they are told.
    Exact or calibrated
        Exact to the bit but for the order in which a product adds; chosen by time like any other option.
    What it costs
        Nothing to apply. A split at run time, which a runtime may make a copy.
    Before and after
        ``x W_q, x W_k, x W_v`` -> ``split(x [W_q W_k W_v])``.
    Source
        Packed projections as in most hand-written Transformers, such as GPT-2 (Radford et al. 2019).
    """

    name: ClassVar[str] = "qkv_packing"
    kind: ClassVar[Literal["exact", "calibrated"]] = "exact"
    order: ClassVar[int] = 8
    combines: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`; also when it is packed already."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        if site.packing:
            return Refusal("already-packed", f"the projections are packed as {site.packing}")
        if _layout(site.key) != _layout(site.value):
            return Refusal("several-sources", "keys and values are projections of different values")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """All three where queries read the same value, and keys and values."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        ways = ("qkv", "kv") if _layout(site.query) == _layout(site.key) else ("kv",)
        return tuple(Option.of(self.name, site.id, pack=way) for way in ways)

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; needs no statistics."""
        way = dict(option.parameters).get("pack")
        if way == "none" and isinstance(site, AttentionSite):
            return replace(site, packing="")
        refusal = self.refuse(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            raise OptionError(f"{option} does not apply: {refusal.why if refusal else ''}", "Leave the option out")
        if way == "kv":
            return replace(site, packing="kv")
        if way == "qkv" and _layout(site.query) == _layout(site.key):
            return replace(site, packing="qkv")
        raise OptionError(f"{option} does not fit {site.id}", "Write pack=qkv (of one source), pack=kv or pack=none")


def _layout(part: Projection) -> tuple[str, bool, bool, bool]:
    return part.source, part.time_first, part.flatten, part.channels_first
