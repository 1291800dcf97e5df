"""Finds every attention and feed-forward block of a graph by what it computes.

Structure proposes, intervention decides: the graph is run on small feeds, and every claim about a region is a claim
about values that were replaced and moved. What is claimed is then lowered and compared with the original
(`rewriter.attention.judge`). No operator sequence is ever matched. Large weights are never read: drawn numbers stand in
for them while a region is probed, and the sites hold views of the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import torch

from rewriter.attention.caches import with_cache_problems
from rewriter.attention.control_flow import Inlined, inlined
from rewriter.attention.dequantise import dequantised, is_quantised
from rewriter.attention.failures import named
from rewriter.attention.feed_forward import raise_feed_forward
from rewriter.attention.feeds import usable_feeds
from rewriter.attention.identity import demoted
from rewriter.attention.judge import Judge
from rewriter.attention.native import Native
from rewriter.attention.paths import Paths
from rewriter.attention.recipes import with_own_weights
from rewriter.attention.shapes import remember
from rewriter.attention.sites import raise_anchor
from rewriter.attention.trace import Trace, drawn, label
from rewriter.core.errors import UnsupportedOperator, UserError
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import AttentionSite, FeedForwardSite, RaisedSite, Recognition, State, Unrecognised
from rewriter.graph.onnx import OnnxGraph

SiteKind = TypeVar("SiteKind", AttentionSite, FeedForwardSite)


def recognise(graph: OnnxGraph, feeds: Mapping[str, np.ndarray] | None = None, seed: int = 0) -> Recognition:
    """All sites of a graph with their states, and every softmax that looks like attention but was not understood.

    `feeds` is one example of the inputs; dynamic axes are cut to a few tokens. Without it, feeds are drawn from what
    the inputs are used for. A graph that takes neither gives no sites, and names its softmaxes as unrecognised.
    Raises `DataError` if an input is missing from `feeds`. Sites of quantised graphs are found and mapped on a copy
    that computes in floats, and are not to be rewritten; neither are those inside control flow.
    """
    with _one_thread():
        found = _whole(graph, feeds, seed)
        inside = [_inside(place, feeds, seed) for place in inlined(graph)]
    return _joined(found, inside) if inside else found


def _whole(graph: OnnxGraph, feeds: Mapping[str, np.ndarray] | None, seed: int) -> Recognition:
    if not is_quantised(graph):
        return _recognise(graph, feeds, seed)
    why = Refusal("quantised", "weights or activations here are quantised; rewrite the model before quantising it")
    return _capped(_recognise(dequantised(graph), feeds, seed), why)


def _inside(place: Inlined, feeds: Mapping[str, np.ndarray] | None, seed: int) -> Recognition:
    """What a body of control flow holds, and the bodies inside it."""
    why = Refusal("control-flow", "it lies in a subgraph of the model", (place.prefix.rstrip("/"),))
    try:
        found = _only_within(_whole(place.graph, None if place.from_inputs else feeds, seed), place)
        deeper = inlined(place.graph, place.from_inputs, place.prefix)
        inner = [_inside(replace(other, order=place.order), feeds, seed) for other in deeper]
    except UserError as problem:
        missed = Unrecognised(place.prefix.rstrip("/"), Refusal("control-flow", problem.what, why.nodes))
        return Recognition((), (), (missed,))
    return _joined(_capped(found, why), inner)


def _only_within(found: Recognition, place: Inlined) -> Recognition:
    def kept(sites: tuple[SiteKind, ...]) -> tuple[SiteKind, ...]:
        own = [site for site in sites if all(name.startswith(place.prefix) for name in site.nodes[:1])]
        return tuple(replace(site, id=f"{place.prefix}{site.id}", order=place.order) for site in own)

    missed = tuple(entry for entry in found.unrecognised if entry.node.startswith(place.prefix))
    return Recognition(kept(found.attention), kept(found.feed_forward), missed)


def _joined(found: Recognition, others: list[Recognition]) -> Recognition:
    everything = [found, *others]
    return Recognition(
        tuple(sorted((site for one in everything for site in one.attention), key=lambda site: site.order)),
        tuple(sorted((site for one in everything for site in one.feed_forward), key=lambda site: site.order)),
        tuple(entry for one in everything for entry in one.unrecognised),
    )


def _recognise(graph: OnnxGraph, feeds: Mapping[str, np.ndarray] | None, seed: int) -> Recognition:
    paths = Paths(graph)
    try:
        interpreter = drawn(graph, paths)
    except UnsupportedOperator as problem:
        refusal = Refusal("unsupported-operator", problem.what, (problem.node,))
        named = {entry.node: entry for entry in _listed(graph, refusal).unrecognised}
        return Recognition((), (), tuple((named | {problem.node: Unrecognised(problem.node, refusal)}).values()))
    failures: list[str] = []
    runs = usable_feeds(interpreter, paths, feeds, seed, failures)
    if runs is None:
        return _nothing(graph, failures)
    first, second, third = runs
    remember(graph, first.shapes, second.shapes)
    trace = Trace(graph, first.feeds, interpreter)
    judge = Judge(trace, second.feeds, seed, raise_site)
    sites, unrecognised = _judged(trace, judge)
    native = Native(graph, paths)
    together = _judged_together(judge, sites, third.feeds)
    sites = [with_own_weights(site, trace.recipes, native.matrix) for site in with_cache_problems(graph, together)]
    attention = tuple(site for site in sites if isinstance(site, AttentionSite))
    feed_forward = tuple(site for site in sites if isinstance(site, FeedForwardSite))
    return Recognition(attention, feed_forward, unrecognised)


def _capped(found: Recognition, why: Refusal) -> Recognition:
    """The same sites, which must not be rewritten, for a reason."""

    def capped(site: SiteKind) -> SiteKind:
        state = State.MAPPED if site.state is State.LOWERABLE else site.state
        return replace(site, state=state, problems=(*site.problems, why))

    return Recognition(tuple(map(capped, found.attention)), tuple(map(capped, found.feed_forward)), found.unrecognised)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors here are small: a second thread costs several times what it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def raise_site(trace: Trace, node: ir.Node) -> RaisedSite | None:
    """The site whose anchor is this node: a softmax or attention operator, or the last linear of a feed-forward.

    None for nodes that are none; raises `Refused` for what looks like attention but is not understood.
    """
    with named(label(node)):
        return raise_anchor(trace, node) or raise_feed_forward(trace, node)


def _judged(trace: Trace, judge: Judge) -> tuple[list[RaisedSite], tuple[Unrecognised, ...]]:
    """Every site in data-flow order, with ids, each judged on its own; and the anchors that were not understood."""
    found: list[RaisedSite] = []
    unrecognised = []
    before = 0
    for node in trace.nodes:
        try:
            site = raise_site(trace, node)
        except Refused as problem:
            unrecognised.append(Unrecognised(label(node), problem.refusal))
            continue
        if site is not None:
            found.append(_judged_alone(judge, site, node))
            judge.forget(before)
            before = trace.paths.index[id(node)]
    return _named(found), tuple(unrecognised)


def _judged_alone(judge: Judge, site: RaisedSite, node: ir.Node) -> RaisedSite:
    try:
        with named(label(node)):
            return judge.judge(site, node)
    except Refused as problem:
        return demoted(site, problem.refusal)


def _judged_together(judge: Judge, sites: list[RaisedSite], feeds: Mapping[str, np.ndarray]) -> list[RaisedSite]:
    """Nothing is lowerable where the check of the whole graph itself broke down."""
    try:
        with named("the whole graph"):
            return judge.together(sites, feeds)
    except Refused as problem:
        return [demoted(site, problem.refusal) if site.state is State.LOWERABLE else site for site in sites]


def _named(sites: list[RaisedSite]) -> list[RaisedSite]:
    counts = {"attention": 0, "feed_forward": 0}
    named = []
    for site in sorted(sites, key=lambda site: site.order):
        kind = "attention" if isinstance(site, AttentionSite) else "feed_forward"
        named.append(replace(site, id=f"layers.{counts[kind]}.{kind}"))
        counts[kind] += 1
    return named


def _nothing(graph: OnnxGraph, failures: list[str]) -> Recognition:
    first = f" ({failures[0]})" if failures else ""
    refusal = Refusal("no-feeds", f"the graph took none of the inputs drawn for it{first}; give an example of them")
    return _listed(graph, refusal)


def _listed(graph: OnnxGraph, refusal: Refusal) -> Recognition:
    """No site, but everything that is named attention, or is a softmax, with one reason."""
    nodes = [node for node in graph.topological() if node.op_type == "Softmax" or node.op_type.endswith("Attention")]
    return Recognition((), (), tuple(Unrecognised(label(node), refusal) for node in nodes))
