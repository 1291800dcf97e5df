"""Let queries see near keys and the first few only, where the attention is there anyway."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_input, attention_refusal, out_of_range
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import SINKS, AttentionStatistics, Detail, Statistics
from rewriter.core.target import Target

LONG = 256  # tokens from which a window can be worth its bookkeeping
MOST_OUTSIDE = 0.02  # the mean share of the attention that a window may hide


@dataclass(frozen=True)
class LocalWindow(Pass):
    """Hide keys that are far away, but for the first ones, which soak up attention that nothing else wants.

    What it does
        Hides keys ``size`` or more tokens away from the query, before it and, where attention looks ahead, behind it;
        the first ``sinks`` keys stay visible to all. The mask of the model stays as it is: a low finite number is added
        outside of the window, so that a query whose near keys are all padding sees what it saw.
    When it applies
        Self-attention of as many queries as keys, with weights known and no cache, in a model that was seen with long
        sequences. Search leaves out windows that would hide more than 2 % of the attention on the data.
    Exact or calibrated
        Calibrated; exact when the window holds the sequence. It needs the mean attention by distance.
    What it costs
        One pass over the probabilities of the calibration set. At run time a mask, until a kernel skips what it hides.
    Before and after
        4096 keys per query -> ``local_window{sinks=4,size=256}``: at most 515 of them.
    Source
        Sliding windows: Beltagy et al. 2020 (Longformer); sinks: Xiao et al. 2024 (StreamingLLM).
    """

    name: ClassVar[str] = "local_window"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 12
    requires: ClassVar[frozenset[Detail]] = frozenset({"distance"})
    combines: ClassVar[bool] = False

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        _, queries, keys = site.example_shape
        if site.cross or queries != keys:
            return Refusal("cross-attention", "keys are other tokens than queries, so there is no distance")
        if site.bias.window:
            return Refusal("already-local", f"keys {site.bias.window} tokens away are hidden already")
        if queries < LONG:
            return Refusal("short-sequences", f"the model was seen with {queries} tokens, too few for a window")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Powers of two from a quarter of the sequence down to 32."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        sizes = [2**power for power in range(20, 4, -1) if 2**power <= site.example_shape[1] // 4]
        return tuple(Option.of(self.name, site.id, size=size, sinks=SINKS) for size in sizes)

    def doubt(self, site: Site, option: Option, statistics: Statistics) -> Refusal | None:
        """Too much of the attention would be hidden."""
        outside = hidden_share(statistics, option.integer("size"))
        if outside <= MOST_OUTSIDE:
            return None
        return Refusal("attention-is-far", f"{outside:.1%} of the attention is outside of the window")

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; the output projection stays, since its features change in no linear way."""
        own, _ = attention_input(self.refuse(site), site, option, statistics)
        size, sinks = option.integer("size"), option.integer("sinks")
        if size < 1 or sinks < 0:
            raise out_of_range(option, "size" if size < 1 else "sinks", 1 if size < 1 else 0, 1 << 20)
        if size >= 1 << 20:
            raise out_of_range(option, "size", 1, (1 << 20) - 1)
        return replace(own, bias=replace(own.bias, window=size, sinks=sinks))


def hidden_share(statistics: Statistics, size: int) -> float:
    """The mean share of the attention that is `size` or more tokens away and on no sink."""
    if not isinstance(statistics, AttentionStatistics) or statistics.distance_HT is None:
        return 1.0
    return float(statistics.distance_HT[:, size:].sum(axis=1).mean())
