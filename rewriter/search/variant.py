"""A variant: the original graph with some sites rewritten, ready to be lowered by any runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rewriter.attention.lower import lower
from rewriter.core.option import Plan
from rewriter.core.rewrite import Pass
from rewriter.core.site import Site
from rewriter.graph.onnx import OnnxGraph
from rewriter.search.caches import cache_maps
from rewriter.search.problem import Options


@dataclass(frozen=True)
class Variant:
    """`graph` holds composites in place of the sites; `plan` says what was done to which."""

    name: str
    plan: Plan
    sites: Mapping[str, Site]
    graph: OnnxGraph

    @property
    def caches(self) -> dict[str, NDArray[Any]]:
        """How caches of the model as it was become this variant's, see `rewriter.search.caches`."""
        return cache_maps(self.graph, self.sites.values())

    @classmethod
    def of(cls, name: str, original: OnnxGraph, plan: Plan, sites: Iterable[Site]) -> Variant:
        """Lower the sites into a copy of the original graph."""
        kept = list(sites)
        return cls(name, plan, {site.id: site for site in kept}, lower(original, kept))


def apply_exact(sites: Iterable[Site], options: Mapping[str, Options], passes: Mapping[str, Pass]) -> list[Site]:
    """The sites after their exact options, which need no data."""
    rewritten = []
    for site in sites:
        for option in options.get(site.id, ()):
            site = passes[option.name].apply(site, option, None)
        rewritten.append(site)
    return rewritten


def merge(exact: Mapping[str, Options], calibrated: Plan, order: Iterable[str]) -> Plan:
    """Exact options first, then the calibrated ones, at each site in data-flow order."""
    return Plan({site: both for site in order if (both := (*exact.get(site, ()), *calibrated.at(site)))})
