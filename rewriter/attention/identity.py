"""The identity gate: a site is lowerable only if what is lowered does what the graph does, and a wrong one does not.

Each site is checked on its own, on top of the original's values, so that one site cannot spoil another; then all of
them together, as a whole graph. Float64 throughout: what differs by more than 1e-9 of its scale is another function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rewriter.attention.lower import fragment, lower, result_of
from rewriter.attention.shake import borrowed
from rewriter.attention.trace import Trace
from rewriter.core.errors import UserError
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, AttentionSite, FeedForwardSite, Site, State
from rewriter.graph.onnx import OnnxGraph

TOLERANCE = 1e-9
EFFECT = 1e-6


@dataclass(frozen=True)
class Check:
    """One run of the graph, and the sites raised for its weights by the name of their result."""

    trace: Trace
    sites: Mapping[str, Site]
    shaken: bool
    hostile: bool


def exact(site: Site) -> Site:
    """The same site with the graph's own element-wise nodes: named functions equal theirs only to float32 constants."""
    return replace(site, activation="path") if isinstance(site, FeedForwardSite) else site


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected magnitude; infinite if shapes or NaN patterns differ."""
    if actual.shape != expected.shape or not torch.equal(torch.isnan(actual), torch.isnan(expected)):
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not expected.numel():
        return 0.0
    actual, expected = torch.nan_to_num(actual), torch.nan_to_num(expected)
    scale = max(float(expected.abs().max()), 1e-300)
    return float((actual - expected).abs().max()) / scale


def local_problem(trace: Trace, site: Site, effect: bool) -> Refusal | None:
    """Why a site alone, on the values of a run, is not the identity; None if it is.

    With `effect`, one head (or hidden unit) set to zero must move the result, or the check would prove nothing.
    """
    try:
        error = difference(_run(trace, exact(site)), trace.env[result_of(site)])
        if not error <= TOLERANCE:
            return Refusal("identity", f"lowered anew it differs by {error:.1e} of its scale", site.nodes)
        if effect and difference(_run(trace, _damaged(exact(site))), trace.env[result_of(site)]) < EFFECT:
            return Refusal("no-effect", "zeroing one head or unit changes nothing, so no check can fail", site.nodes)
    except Refused as refusal:
        return refusal.refusal
    except UserError as problem:
        return Refusal("lowering-failed", problem.what, site.nodes)
    return None


def _run(trace: Trace, site: Site) -> torch.Tensor:
    part = fragment(trace.graph, site, exact=True)
    env = dict(trace.env)
    env.update({name: trace.interpreter.tensor(array) for name, array in part.constants.items()})
    for name in part.outputs:
        env.pop(name)
    trace.interpreter.run_nodes(part.nodes, env)
    return env[part.outputs[0]]


def _damaged(site: Site) -> Site:
    if isinstance(site, AttentionSite):
        assert site.output is not None
        weight_HDC = site.output.weight_HDC.copy()
        weight_HDC[0] = 0
        return replace(site, output=replace(site.output, weight_HDC=weight_HDC))
    down_FC = site.down_FC.copy()
    down_FC[: max(1, len(down_FC) // 4)] = 0
    return replace(site, down_FC=down_FC)


def joint_problem(
    graph: OnnxGraph, lowered: OnnxGraph, trace: Trace, feeds: Mapping[str, Array] | None = None
) -> Refusal | None:
    """Why the whole lowered graph is not the original, with the weights of a trace; None if it is."""
    expected = trace.env if feeds is None else trace.interpreter.run(feeds)
    try:
        actual = borrowed(lowered, trace.interpreter.constants).run(trace.feeds if feeds is None else feeds)
    except UserError as problem:
        return Refusal("lowering-failed", problem.what)
    worst = max((difference(actual[spec.name], expected[spec.name]) for spec in graph.outputs), default=0.0)
    return None if worst <= TOLERANCE else Refusal("identity", f"the whole graph differs by {worst:.1e} of its scale")


def surviving(lowered: OnnxGraph, site: Site) -> tuple[str, ...]:
    """Values of the old core that the lowered graph still computes."""
    if isinstance(site, FeedForwardSite):
        return ()
    return tuple(name for name in site.names.get("inner", "").split("\n") if name and lowered.has(name))


def promote(
    graph: OnnxGraph, sites: Sequence[Site], checks: Sequence[Check], third: Mapping[str, Array]
) -> tuple[Site, ...]:
    """The sites with their final state: lowerable where every check passes, with the problem recorded where not.

    The first check is the graph with its own weights, the last one has others; `third` are feeds of sizes that
    raising has never seen.
    """
    judged = [_judge(site, checks) for site in sites]
    for check, feeds in ((checks[0], third), (checks[-1], None)):
        passed = [site for site in judged if site.state is State.LOWERABLE]
        failures = _joint_failures(graph, passed, check, feeds)
        judged = [_demoted(site, failures[site.id]) if site.id in failures else site for site in judged]
    return tuple(judged)


def _judge(site: Site, checks: Sequence[Check]) -> Site:
    blocking = [p for p in site.problems if not p.code.startswith("bias-depends-on")]
    if not result_of(site) or blocking:
        return site
    for number, check in enumerate(checks):
        own = check.sites.get(result_of(site))
        if own is None:
            return _demoted(site, Refusal("unstable", "with other weights the site is not recognised", site.nodes))
        problem = local_problem(check.trace, own, effect=number > 0 and check.shaken)
        if problem and problem.code == "identity" and check.hostile:
            why = f"only with holes, left padding or fully masked rows: {problem.why}"
            problem = Refusal("identity-under-masks", why, problem.nodes)
        if problem:
            return _demoted(site, problem)
    return replace(site, state=State.LOWERABLE)


def _demoted(site: Site, problem: Refusal) -> Site:
    mapped = isinstance(site, FeedForwardSite) or site.mapped
    return replace(site, state=State.MAPPED if mapped else State.FOUND, problems=(*site.problems, problem))


def _joint_failures(
    graph: OnnxGraph, sites: Sequence[Site], check: Check, feeds: Mapping[str, Array] | None
) -> dict[str, Refusal]:
    """Problems by site once all are lowered together; sites are tried one at a time only if the whole fails."""
    own = [replace(exact(check.sites[result_of(site)]), id=site.id) for site in sites]
    if not own:
        return {}
    lowered = lower(graph, own, exact=True)
    failures = {}
    for site in own:
        left = surviving(lowered, site)
        if left:
            failures[site.id] = Refusal("old-core-alive", "the old attention is still needed by something else", left)
    if joint_problem(graph, lowered, check.trace, feeds) is None:
        return failures
    for site in own:
        problem = joint_problem(graph, lower(graph, [site], exact=True), check.trace, feeds)
        if problem and site.id not in failures:
            failures[site.id] = problem
    return failures
