"""Which sites may be rewritten: the first of every kind is proved in full, the others are checked against it.

Full proof: raised again with noise on all weights, compared at two sizes, with hostile masks, and with a wrong variant
that must be noticed. Sites whose regions differ in weights alone (`rewriter.attention.region`) are raised themselves
and compared once. In the end all of them are lowered together, and whole graphs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from rewriter.attention.identity import TOLERANCE, allowed, demoted, joint_failures, local_problem
from rewriter.attention.lower import result_of
from rewriter.attention.region import Regions
from rewriter.attention.trace import Trace, drawn
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, Site, State

Raise = Callable[[Trace, ir.Node], Site | None]


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
        self._tolerance = TOLERANCE
        self._noisy_sites: dict[str, Site] = {}

    def judge(self, site: Site, node: ir.Node) -> Site:
        """The site with its state, as far as it can be told without the other sites; `node` is its anchor."""
        blocking = [p for p in site.problems if not p.code.startswith("bias-depends-on")]
        if not result_of(site) or blocking:
            return site
        kind = self._regions.fingerprint(site)
        if kind not in self._verdicts:
            self._verdicts[kind] = problem = self._proved(site, node)
        else:
            problem = self._verdicts[kind] or local_problem(self.first, site, effect=False)
        return demoted(site, problem) if problem else replace(site, state=State.LOWERABLE)

    def forget(self, before: int) -> None:
        """Drop values that nodes from topological index `before` on do not read."""
        for trace in (self.first, self.noisy, self.second, self.noisy_second):
            trace.env.prune(before)

    def _proved(self, site: Site, node: ir.Node) -> Refusal | None:
        try:
            noisy = self.raise_site(self.noisy, node)
        except Refused:
            noisy = None
        if noisy is None or result_of(noisy) != result_of(site):
            return Refusal("unstable", "with other weights the site is not recognised", site.nodes)
        self._noisy_sites[result_of(site)] = noisy
        problem = local_problem(self.first, site, False) or local_problem(self.noisy, noisy, True)
        if problem:
            return problem
        problem = local_problem(self.second, site, False) or local_problem(self.noisy_second, noisy, True)
        if problem and problem.code == "identity":
            why = f"only with holes, left padding or fully masked rows: {problem.why}"
            problem = Refusal("identity-under-masks", why, problem.nodes)
        if problem is None:
            # differences of several layers add up
            self._tolerance = max(self._tolerance, 10 * allowed(self.noisy_second, noisy))
        return problem

    def together(self, sites: Sequence[Site], third: Mapping[str, Array]) -> list[Site]:
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
