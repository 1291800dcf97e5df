"""The identity gate: a site is lowerable only if what is lowered does what the graph does, and a wrong one does not.

Each site is compared on its own, on top of the original's values, so that one site cannot spoil another; then all of
them together, as a whole graph. Float64 throughout: what differs by more than 1e-9 of its scale is another function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rewriter.attention.damage import without_a_part, wrong_variants
from rewriter.attention.lower import fragment, lower, result_of
from rewriter.attention.trace import Trace
from rewriter.attention.weights import Borrowed
from rewriter.core.errors import UserError
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, AttentionSite, FeedForwardSite, RaisedSite, ScoreBias, State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, reads

TOLERANCE = 1e-9
EFFECT = 1e-6
VAST = 1e10  # numbers beyond swallow scores whole, in any order


def exact(site: RaisedSite) -> RaisedSite:
    """The same site with the graph's own element-wise nodes: named functions equal theirs only to float32 constants."""
    return replace(site, activation="path") if isinstance(site, FeedForwardSite) and site.path_start else site


def difference(actual: torch.Tensor, expected: torch.Tensor, limits: torch.Tensor | float = 1.0) -> float:
    """Largest difference as a share of the largest finite expected magnitude, over the `limits` of every row.

    Infinite if shapes differ, or if not the same numbers are NaN, infinite or negative infinite.
    """
    if actual.shape != expected.shape or not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not expected.numel():
        return 0.0
    finite = torch.isfinite(expected)
    same = torch.nan_to_num(actual, 0.0, 1.0, -1.0) == torch.nan_to_num(expected, 0.0, 1.0, -1.0)
    if not torch.equal(torch.isfinite(actual), finite) or not bool((same | finite).all()):
        return float("inf")
    actual, expected = actual.where(finite, 0.0), expected.where(finite, 0.0)
    scale = max(float(expected.abs().max()), 1e-300)
    return float(((actual - expected).abs() / limits).max()) / scale


def local_problem(trace: Trace, site: RaisedSite) -> Refusal | None:
    """Why a site alone, on the values of a run, is not the identity; None if it is."""
    try:
        own = exact(site)
        env, expected = _run(trace, own), trace.env[result_of(site)]
        error = difference(env[result_of(site)], expected, row_limits(own, env, expected))
    except Refused as refusal:
        return refusal.refusal
    except UserError as problem:
        return Refusal("lowering-failed", problem.what, site.nodes)
    if error <= 1.0:
        return None
    return Refusal("identity", f"lowered anew it differs by {TOLERANCE * error:.1e} of its scale", site.nodes)


def unnoticed(trace: Trace, site: RaisedSite) -> set[str]:
    """The wrong variants of a site that give what the site gives on the values of a run: what it cannot prove."""
    expected = trace.env[result_of(site)]
    own = exact(site)
    if isinstance(own, AttentionSite) and _neutral(trace, own.bias):
        own = replace(own, bias=ScoreBias())
    return {what for what, wrong in wrong_variants(own) if not _noticed(trace, wrong, expected)}


def _neutral(trace: Trace, bias: ScoreBias) -> bool:
    """Whether what a graph adds to scores is nothing in this run: exporters write masks that hide no key."""
    if bias.kind not in ("value", "bool") or bias.also_causal or bias.padding or bias.window:
        return False
    value = trace.env[bias.value]
    return bool(value.all()) if bias.kind == "bool" else not bool(value.any())


def telling(trace: Trace, site: RaisedSite) -> bool:
    """Whether the values of a run would show that a part of a site is missing."""
    return _noticed(trace, without_a_part(site), trace.env[result_of(site)])


def _noticed(trace: Trace, wrong: RaisedSite, expected: torch.Tensor) -> bool:
    try:
        return difference(_run(trace, wrong)[result_of(wrong)], expected) >= EFFECT
    except (UserError, Refused):
        return True


def row_limits(site: RaisedSite, env: Mapping[str, torch.Tensor], expected: torch.Tensor) -> torch.Tensor | float:
    """The difference allowed in every row of a result.

    The order of additions to scores shows where even the largest addend of a row is huge: a query whose keys are all
    masked by -1e9 keeps seven digits of its scores. Elsewhere masked keys weigh exactly nothing.
    """
    bias = env.get(f"{site.id}/bias")
    if not isinstance(site, AttentionSite) or bias is None or not bias.is_floating_point() or bias.ndim < 2:
        return TOLERANCE
    top = bias.amax(-1).abs()
    limits = torch.where(top < VAST, 4.0 * torch.finfo(torch.float64).eps * top, 0.0).clamp(min=TOLERANCE)
    if float(limits.max()) == TOLERANCE:
        return TOLERANCE
    batch, queries = env[f"{site.id}/features"].shape[:2]
    limits_BHS = limits.reshape((1,) * (3 - limits.ndim) + tuple(limits.shape))
    return _by_row(site, limits_BHS.amax(1).expand(batch, queries), expected)


def _by_row(site: AttentionSite, limits_BS: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | float:
    """Limits of queries, laid out like the result of a site."""
    output = site.output
    if output is None or limits_BS.numel() * output.weight_HDC.shape[-1] != expected.numel():
        return TOLERANCE
    if output.apart:
        limits = limits_BS[:, :, None, None].expand(-1, -1, output.apart, 1).permute(output.perm)
        return limits if output.rank == 4 else limits.reshape(-1, limits_BS.shape[1], 1)
    if output.channels_first:
        return limits_BS.reshape(expected.shape[0], 1, *expected.shape[2:])
    return (limits_BS.T if output.time_first else limits_BS).reshape(*expected.shape[:-1], 1)


def rounding(bias: torch.Tensor | None) -> float:
    """What the order of additions to scores may change: masks of -1e9 swallow the last digits of what they meet."""
    if bias is None or not bias.is_floating_point():
        return 0.0
    sizes = bias.abs()
    sizes = sizes[sizes < VAST]
    return 4.0 * torch.finfo(torch.float64).eps * float(sizes.max()) if sizes.numel() else 0.0


def allowed(trace: Trace, site: RaisedSite) -> float:
    """The difference that rounding alone explains in one site, at the values of a run."""
    return max(TOLERANCE, rounding(_run(trace, exact(site)).get(f"{site.id}/bias")))


def _run(trace: Trace, site: RaisedSite) -> dict[str, torch.Tensor]:
    part = fragment(trace.graph, site, exact=True, paths=trace.paths)
    env = {name: trace.interpreter.tensor(array) for name, array in part.constants.items()}
    made = {str(value.name) for node in part.nodes for value in node.outputs}
    for node in part.nodes:
        env.update((name, trace.env[name]) for name in reads(node) if name not in env and name not in made)
    trace.interpreter.run_nodes(part.nodes, env)
    trace.interpreter.forget(part.nodes)
    return env


def joint_problem(
    lowered: OnnxGraph,
    trace: Trace,
    feeds: Mapping[str, Array],
    expected: Mapping[str, torch.Tensor],
    tolerance: float = TOLERANCE,
) -> Refusal | None:
    """Why the whole lowered graph is not the original, with the weights of a trace; None if it is."""
    constants = Borrowed(lowered, trace.interpreter.constants)
    try:
        actual = Interpreter(lowered, torch.float64, constants=constants).run(feeds)
    except UserError as problem:
        return Refusal("lowering-failed", problem.what)
    worst = max((difference(actual[spec.name], expected[spec.name]) for spec in trace.graph.outputs), default=0.0)
    if worst <= tolerance:
        return None
    return Refusal("identity", f"the whole graph differs by {worst:.1e} of its scale")


def joint_failures(
    trace: Trace,
    sites: Sequence[RaisedSite],
    feeds: Mapping[str, Array],
    expected: Mapping[str, torch.Tensor],
    tolerance: float = TOLERANCE,
) -> dict[str, Refusal]:
    """Problems by site id once all sites, raised for a trace's weights, are lowered together.

    `expected` holds the original's outputs for `feeds`. Sites are tried in ever smaller groups only if the whole fails.
    """
    if not sites:
        return {}
    own = [exact(site) for site in sites]
    lowered = lower(trace.graph, own, exact=True)
    failures = {}
    left = {str(value.name) for value in lowered.values()}
    for site in own:
        alive = tuple(name for name in _inner(site) if name in left)
        if alive:
            failures[site.id] = Refusal("old-core-alive", "the old attention is still needed by something else", alive)
    return _blamed(trace, own, lowered, feeds, expected, tolerance) | failures


def _blamed(
    trace: Trace,
    sites: Sequence[RaisedSite],
    lowered: OnnxGraph,
    feeds: Mapping[str, Array],
    expected: Mapping[str, torch.Tensor],
    tolerance: float,
) -> dict[str, Refusal]:
    """The sites of a group that spoil the whole graph, found by halving."""
    problem = joint_problem(lowered, trace, feeds, expected, tolerance)
    if problem is None:
        return {}
    if len(sites) == 1:
        return {sites[0].id: problem}
    found: dict[str, Refusal] = {}
    for part in (sites[: len(sites) // 2], sites[len(sites) // 2 :]):
        found |= _blamed(trace, part, lower(trace.graph, part, exact=True), feeds, expected, tolerance)
    return found or {site.id: problem for site in sites}


def _inner(site: RaisedSite) -> list[str]:
    """Values of the old core, which a lowered graph must not compute any more."""
    names = "" if isinstance(site, FeedForwardSite) else site.names.get("inner", "")
    return [name for name in names.split("\n") if name]


def demoted(site: RaisedSite, problem: Refusal) -> RaisedSite:
    """The site without the state that a problem takes from it, and with the problem on record."""
    mapped = isinstance(site, FeedForwardSite) or site.mapped
    return replace(site, state=State.MAPPED if mapped else State.FOUND, problems=(*site.problems, problem))
