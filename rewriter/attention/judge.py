"""Which sites may be rewritten: the first of every kind is proved in full, the others are checked against it.

Full proof: raised again with noise on all weights, compared at two sizes, with hostile masks, and with a wrong variant
that must be noticed. Sites whose regions differ in weights alone (`rewriter.attention.region`) are raised themselves
and compared once. In the end all of them are lowered together, and whole graphs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from rewriter.attention.activations import holds
from rewriter.attention.identity import (
    TOLERANCE,
    allowed,
    demoted,
    joint_failures,
    local_problem,
    telling,
    unnoticed,
)
from rewriter.attention.lower import result_of
from rewriter.attention.other_ways import Change, other_ways, unchanged
from rewriter.attention.region import Regions
from rewriter.attention.trace import Trace, drawn
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, FeedForwardSite, RaisedSite, State

Raise = Callable[[Trace, ir.Node], RaisedSite | None]


class Judge:
    """Decides the state of sites one after the other; traces with noise are run only as far as they are needed."""

    def __init__(self, first: Trace, second: Mapping[str, Array], seed: int, raise_site: Raise) -> None:
        noisy = drawn(first.graph, first.paths, seed + 1)
        self.first = first
        self.noisy = Trace(first.graph, first.feeds, noisy, first)
        self.second = Trace(first.graph, second, first.interpreter, first)
        self.noisy_second = Trace(first.graph, second, noisy, first)
        self.raise_site = raise_site
        self._regions = Regions(first)
        self._verdicts: dict[str, Refusal | None] = {}
        self._changes: dict[str, Change] = {}
        self._names_hold: dict[str, bool] = {}
        self._tolerance = TOLERANCE
        self._noisy_sites: dict[str, RaisedSite] = {}

    def judge(self, site: RaisedSite, node: ir.Node) -> RaisedSite:
        """The site with its state, as far as it can be told without the other sites; `node` is its anchor."""
        blocking = [p for p in site.problems if not p.code.startswith("bias-depends-on")]
        if not result_of(site) or blocking:
            return site
        kind = self._regions.fingerprint(site)
        if kind not in self._verdicts:
            self._verdicts[kind] = problem = self._proved_somehow(site, node, kind)
            site = self._changes.get(kind, unchanged)(site)
        else:
            site = self._changes.get(kind, unchanged)(site)
            problem = self._verdicts[kind] or self._like_a_proved_one(site, node, self._changes.get(kind, unchanged))
        if problem:
            return demoted(site, problem)
        return replace(self._truly_named(site, kind), state=State.LOWERABLE)

    def _truly_named(self, site: RaisedSite, kind: str) -> RaisedSite:
        """The site with the graph's own element-wise nodes where they are not the function they were named after."""
        if not isinstance(site, FeedForwardSite) or site.activation == "path" or not site.path_start:
            return site
        if kind not in self._names_hold:
            self._names_hold[kind] = holds(self.first, site.activation, site.path_start, site.path_end)
        return site if self._names_hold[kind] else replace(site, activation="path")

    def _like_a_proved_one(self, site: RaisedSite, node: ir.Node, change: Change) -> Refusal | None:
        """The site compared once; in full after all, if its own numbers would not show a mistake."""
        return local_problem(self.first, site) if telling(self.first, site) else self._proved(site, node, change)

    def _proved_somehow(self, site: RaisedSite, node: ir.Node, kind: str) -> Refusal | None:
        """The site as it was raised, or else told in another way: the first that is the identity."""
        problem = self._proved(site, node)
        if problem is None or problem.code not in ("identity", "identity-under-masks"):
            return problem
        for change in other_ways(site):
            if self._proved(change(site), node, change) is None:
                self._changes[kind] = change
                return None
        return problem

    def forget(self, before: int) -> None:
        """Drop values that nodes from topological index `before` on do not read."""
        for trace in (self.first, self.noisy, self.second, self.noisy_second):
            trace.env.prune(before)

    def _proved(self, site: RaisedSite, node: ir.Node, change: Change = unchanged) -> Refusal | None:
        try:
            noisy = self.raise_site(self.noisy, node)
        except Refused:
            noisy = None
        noisy = None if noisy is None else change(noisy)
        if noisy is None or result_of(noisy) != result_of(site):
            return Refusal("unstable", "with other weights the site is not recognised", site.nodes)
        self._noisy_sites[result_of(site)] = noisy
        problem = local_problem(self.first, site) or local_problem(self.noisy, noisy)
        if problem:
            return problem
        problem = local_problem(self.second, site) or local_problem(self.noisy_second, noisy)
        if problem and problem.code == "identity":
            why = f"only with holes, left padding or fully masked rows: {problem.why}"
            problem = Refusal("identity-under-masks", why, problem.nodes)
        if problem is None:
            hidden = self._hidden(site, noisy)
            if hidden:
                what = ", ".join(sorted(hidden))
                return Refusal("no-effect", f"{what} changes nothing, so no check can fail", site.nodes)
            # differences of several layers add up
            self._tolerance = max(self._tolerance, 10 * allowed(self.noisy_second, noisy))
        return problem

    def _hidden(self, site: RaisedSite, noisy: RaisedSite) -> set[str]:
        """The wrong variants that none of the runs compared would show; noise can saturate a softmax, too."""
        hidden = unnoticed(self.noisy, noisy)
        for trace, one in ((self.noisy_second, noisy), (self.first, site), (self.second, site)):
            hidden = hidden & unnoticed(trace, one) if hidden else hidden
        return hidden

    def together(self, sites: Sequence[RaisedSite], third: Mapping[str, Array]) -> list[RaisedSite]:
        """The sites after all were lowered together: with their own small weights on feeds of sizes never seen, and
        with noise where every site was raised with it.
        """
        trace, judged = self.first, list(sites)
        expected = trace.interpreter.run(third)
        failures = joint_failures(
            trace, [s for s in judged if s.state is State.LOWERABLE], third, expected, self._tolerance
        )
        judged = [demoted(s, failures[s.id]) if s.id in failures else s for s in judged]
        passed = [site for site in judged if site.state is State.LOWERABLE]
        if not all(result_of(site) in self._noisy_sites for site in passed):
            return judged
        trace = self.noisy_second
        noisy = [replace(self._noisy_sites[result_of(site)], id=site.id) for site in passed]
        failures = joint_failures(trace, noisy, trace.feeds, trace.env, self._tolerance)
        return [demoted(s, failures[s.id]) if s.id in failures else s for s in judged]
