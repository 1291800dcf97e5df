"""Applies the options of one site one after the other, carrying its statistics along where they follow without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from rewriter.core.errors import OptionError
from rewriter.core.option import Option, Plan
from rewriter.core.rewrite import Pass
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import AttentionStatistics, Detail, Statistics

Passes = Mapping[str, Pass]


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A site with what is known of it. `maps` lead from the original features to its own, in turn.

    `measured` is False once an option changed the features in no linear way: `statistics` then still describe the site
    well enough to choose by, but its output projection must be fitted on features that were run anew. Where even values
    changed, statistics are `stale`: the next option needs new ones.
    """

    site: Site
    statistics: Statistics
    maps: tuple[NDArray[Any], ...] = ()
    measured: bool = True
    stale: bool = False

    def then(self, option: Option, passes: Passes) -> Rewritten:
        """One option further. Raises `OptionError` if its pass is unknown or refuses."""
        rewrite = pass_of(option, passes)
        after = rewrite.apply(self.site, option, self.statistics)
        mapping = rewrite.feature_map(self.site, option, self.statistics)
        if mapping is None:
            moved = isinstance(self.site, AttentionSite) and getattr(after, "value", None) is not self.site.value
            return replace(self, site=after, measured=False, stale=self.stale or moved)
        statistics = self.statistics.with_regression(self.statistics.regression.map(mapping))
        cut = isinstance(after, AttentionSite) and mapping.ndim == 1
        if cut and isinstance(self.site, AttentionSite) and isinstance(statistics, AttentionStatistics):
            heads = [int(column) // self.site.v_dim for column in mapping[:: self.site.v_dim]]
            key_heads = sorted({self.site.key.head_of[head] for head in heads})
            statistics = statistics.keep_heads(heads, key_heads)
        return replace(self, site=after, statistics=statistics, maps=(*self.maps, mapping))


def pass_of(option: Option, passes: Passes) -> Pass:
    """The pass of an option; raises `OptionError` for unknown names."""
    if option.name not in passes:
        raise OptionError(f"there is no pass named {option.name!r}", f"Known passes: {', '.join(passes)}")
    return passes[option.name]


def required(options: Iterable[Option], passes: Passes) -> frozenset[Detail]:
    """The statistics that the passes of these options read."""
    return frozenset[Detail]().union(*(pass_of(option, passes).needs(option) for option in options))


def calibrated_options(options: Iterable[Option], passes: Passes) -> tuple[Option, ...]:
    """The options that need data, in their order."""
    return tuple(option for option in options if pass_of(option, passes).kind == "calibrated")


def apply_exact(sites: Sequence[Site], plan: Plan, passes: Passes) -> list[Site]:
    """The sites after the plan's exact options, which need no data; calibrated ones are skipped."""
    found = []
    for site in sites:
        for option in plan.at(site.id):
            if pass_of(option, passes).kind == "exact":
                site = passes[option.name].apply(site, option, None)
        found.append(site)
    return found
