"""Our rewrites at a share of the operations: each pass alone at one level everywhere, and the mix that a solver finds.

The solver is the product's own, with operations in the place of seconds: quality against the share of operations says
what a rewrite costs in accuracy, whatever a processor makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.quality.checkpoint import Checkpoint, Outputs, outputs
from rewriter.assembly.assemble import assemble, price_options
from rewriter.attention.lower import lower
from rewriter.core.option import Option, Plan
from rewriter.core.passes_registry import discover
from rewriter.core.rewrite import Pass
from rewriter.core.site import Site
from rewriter.core.target import Target
from rewriter.rivals.budget import Reduced, Sizes
from rewriter.search.candidates import candidates
from rewriter.search.problem import Choice, Options, Problem
from rewriter.search.refine import best_uniform
from rewriter.search.selection import Selection
from rewriter.search.sensitivity import build_problem, slopes
from rewriter.search.solvers import solve
from rewriter.search.structure import blank_statistics, restructure

ALONE = ("head_pruning", "low_rank_qk", "low_rank_vo", "kv_merge", "attention_replacement", "ffn_pruning")
_PRICING_BATCHES, _PROBE_BATCHES = 12, 4
_BISECTIONS = 40


@dataclass
class Ours:
    """What is learned about one checkpoint once: sizes, local errors and what they mean for its output."""

    checkpoint: Checkpoint
    target: Target
    passes: Mapping[str, Pass] = field(default_factory=lambda: _cutting(discover()))
    _problem: Problem | None = None
    _last: Reduced | None = None

    def __post_init__(self) -> None:
        self.by_id: dict[str, Site] = {site.id: site for site in self.checkpoint.sites}
        self.sizes = Sizes(self.by_id, self.checkpoint.tokens)

    def alone(self, name: str, share: float) -> Reduced | None:
        """One pass at the same level everywhere: the mildest that fits into `share`, or the strongest there is.

        None if the pass offers nothing that all sites share.
        """
        ladders = {site.id: self.passes[name].options(site, self.target) for site in self.checkpoint.sites}
        common = [_anywhere(options) for options in ladders.values() if options]
        if not common:
            return None
        shared = [option for option in common[0] if all(option in levels for levels in common)]
        plans = (
            Plan({site: (Option(option.name, option.parameters, site),) for site, levels in ladders.items() if levels})
            for option in shared
        )
        priced = [(self._share(plan), plan) for plan in plans]
        if not priced:
            return None
        fitting = [one for one in priced if one[0] <= share + 1e-9] or [min(priced, key=lambda one: one[0])]
        return self.built(max(fitting, key=lambda one: one[0])[1])

    def mix(self, share: float) -> Reduced:
        """The better of two assembled mixes at this share: solved per site, and the same at every site of a kind."""
        problem = self.problem()
        budget = _bisect(lambda damage: self._picked_share(solve(problem, damage)), share)
        plans = [problem.plan(picked) for picked in (solve(problem, budget), self._uniform(problem, share)) if picked]
        original = outputs(self.checkpoint.graph, self.checkpoint.select)
        tried = [self.built(plan) for plan in dict.fromkeys(plans)]
        return min(tried, key=lambda one: self._damage(original, one.sites))

    def built(self, plan: Plan) -> Reduced:
        """A plan assembled bottom-up with its output projections fitted anew."""
        check = self.checkpoint
        if self._last is None or self._last.detail != str(plan):
            found = assemble(
                check.graph, check.sites, plan, self.passes, check.calibrate, check.choose, resolve="changed"
            )
            self._last = Reduced(found.sites, self.sizes.share(found.sites), str(plan))
        return self._last

    def problem(self) -> Problem:
        """Every combination of cuts at every site with its operations and predicted damage."""
        if self._problem is None:
            found = {site.id: self._combinations(site) for site in self.checkpoint.sites}
            check = self.checkpoint
            errors = price_options(check.graph, check.sites, found, self.passes, check.calibrate[:_PRICING_BATCHES])
            original = outputs(check.graph, check.select)
            slope = slopes(errors, lambda plan: self._damage(original, self._probe(plan)))
            flops = {name: {one: self._flops(name, one) for one in options} for name, options in found.items()}
            self._problem = build_problem(flops, errors, slope)
        return self._problem

    def _combinations(self, site: Site) -> Sequence[Options]:
        """The search's own candidates without number formats, which change no operation."""
        return candidates(site, Selection(self.passes, {}), self.target, "normal") or ((),)

    def _probe(self, plan: Plan) -> Mapping[str, Site]:
        check = self.checkpoint
        some = check.calibrate[:_PROBE_BATCHES]
        return assemble(check.graph, check.sites, plan, self.passes, some, some[-1:], resolve="changed").sites

    def _damage(self, original: Sequence[Outputs], sites: Mapping[str, Site]) -> float:
        check = self.checkpoint
        return check.divergence(original, outputs(lower(check.graph, sites.values()), check.select))

    def _flops(self, name: str, options: Options) -> float:
        site = self.by_id[name]
        return float(self.sizes.flops(restructure(site, options, self.passes, blank_statistics(site))))

    def _share(self, plan: Plan) -> float:
        return sum(self._flops(name, plan.at(name)) for name in self.by_id) / self.sizes.whole

    def _picked_share(self, picked: Mapping[str, Choice] | None) -> float:
        return 1.0 if picked is None else sum(one.latency_s for one in picked.values()) / self.sizes.whole

    def _uniform(self, problem: Problem, share: float) -> Mapping[str, Choice] | None:
        budget = _bisect(lambda damage: self._picked_share(best_uniform(problem, damage)), share)
        return best_uniform(problem, budget)


def _cutting(passes: Mapping[str, Pass]) -> Mapping[str, Pass]:
    """Passes that take operations away, on self-attention of any kind."""
    return {name: one for name, one in passes.items() if name in ALONE}


def _anywhere(options: Sequence[Option]) -> list[Option]:
    return [Option(option.name, option.parameters) for option in options]


def _bisect(share_at: Callable[[float], float], share: float) -> float:
    """The least damage, on a logarithmic scale, at which what is left fits into `share`."""
    low, high = np.log(1e-9), np.log(1e3)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if share_at(float(np.exp(middle))) <= share else (middle, high)
    return float(np.exp(high))
