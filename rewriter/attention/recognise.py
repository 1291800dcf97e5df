"""Finds every attention and feed-forward block of a graph by what it computes.

Structure proposes, intervention decides: the graph is run on small feeds, once with its own weights and once with
noise on them, and every claim about a region is a claim about values that were replaced and moved. What is claimed is
then lowered and compared with the original (`rewriter.attention.identity`). No operator sequence is ever matched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from rewriter.attention.feed_forward import raise_feed_forward
from rewriter.attention.feeds import draw, roles, size_choices
from rewriter.attention.identity import Check, promote
from rewriter.attention.lower import result_of
from rewriter.attention.shake import shaken
from rewriter.attention.shapes import remember
from rewriter.attention.sites import raise_anchor
from rewriter.attention.trace import Trace, label
from rewriter.core.errors import UserError
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import AttentionSite, FeedForwardSite, Recognition, Site, Unrecognised
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph

Feeds = dict[str, np.ndarray]


def recognise(graph: OnnxGraph, feeds: Mapping[str, np.ndarray] | None = None, seed: int = 0) -> Recognition:
    """All sites of a graph with their states, and every softmax that looks like attention but was not understood.

    `feeds` is one example of the inputs; dynamic axes are cut to a few tokens. Without it, feeds are drawn from what
    the inputs are used for. A graph that takes neither gives no sites, and names its softmaxes as unrecognised.
    Raises `DataError` if an input is missing from `feeds`.
    """
    own = Interpreter(graph, dtype=torch.float64)
    runs = _feeds(own, graph, feeds, seed)
    if runs is None:
        return _nothing(graph)
    first = Trace(graph, runs[0], own)
    noisy = Trace(graph, runs[0], shaken(graph, seed), first)
    second = Trace(graph, runs[1], own, first)
    noisy_second = Trace(graph, runs[1], noisy.interpreter, first)
    remember(graph, *({name: tuple(t.shape) for name, t in trace.env.items()} for trace in (first, second)))
    found, unrecognised = raise_all(first)
    others, _ = raise_all(noisy)
    sites, with_noise = (_by_result(some) for some in (found, others))
    ids = {result: site.id for result, site in sites.items()}
    with_noise = {result: replace(site, id=ids.get(result, site.id)) for result, site in with_noise.items()}
    checks = [
        Check(first, sites, shaken=False, hostile=False),
        Check(noisy, with_noise, shaken=True, hostile=False),
        Check(second, sites, shaken=False, hostile=True),
        Check(noisy_second, with_noise, shaken=True, hostile=True),
    ]
    return _recognition(promote(graph, found, checks, runs[2]), unrecognised)


def _by_result(sites: tuple[Site, ...]) -> dict[str, Site]:
    return {result_of(site): site for site in sites if result_of(site)}


def _recognition(sites: tuple[Site, ...], unrecognised: tuple[Unrecognised, ...]) -> Recognition:
    attention = tuple(site for site in sites if isinstance(site, AttentionSite))
    feed_forward = tuple(site for site in sites if isinstance(site, FeedForwardSite))
    return Recognition(attention, feed_forward, unrecognised)


def raise_all(trace: Trace) -> tuple[tuple[Site, ...], tuple[Unrecognised, ...]]:
    """Every site of a run in data-flow order, with ids, and the anchors that were not understood."""
    attention: list[AttentionSite] = []
    feed_forward: list[FeedForwardSite] = []
    unrecognised = []
    for node in trace.nodes:
        try:
            site = raise_anchor(trace, node)
        except Refused as problem:
            unrecognised.append(Unrecognised(label(node), problem.refusal))
            continue
        if site is not None:
            attention.append(site)
            continue
        block = raise_feed_forward(trace, node)
        if block is not None:
            feed_forward.append(block)
    attention.sort(key=lambda site: site.order)
    named: list[Site] = [replace(site, id=f"layers.{i}.attention") for i, site in enumerate(attention)]
    named += [replace(block, id=f"layers.{i}.feed_forward") for i, block in enumerate(feed_forward)]
    return tuple(sorted(named, key=lambda site: site.order)), tuple(unrecognised)


def _feeds(
    interpreter: Interpreter, graph: OnnxGraph, example: Mapping[str, np.ndarray] | None, seed: int
) -> list[Feeds] | None:
    """Feeds of three sizes that the graph takes, the second and third with hostile masks; None if it takes none."""
    known, found = roles(graph), []
    if example is not None:
        interpreter.bind(example)  # raises for missing inputs
    for round_ in range(3):
        drawn = (draw(graph, sizes, known, seed + round_, round_ > 0, example) for sizes in size_choices(graph, round_))
        usable = next((feeds for feeds in drawn if _takes(interpreter, feeds)), None)
        if usable is None and example is not None:
            usable = dict(example)
        if usable is None:
            return None
        found.append(usable)
    return found


def _takes(interpreter: Interpreter, feeds: Feeds) -> bool:
    try:
        interpreter.run(feeds)
    except UserError:
        return False
    return True


def _nothing(graph: OnnxGraph) -> Recognition:
    refusal = Refusal("no-feeds", "the graph did not take any feeds drawn for it; give an example of its inputs")
    softmaxes = [node for node in graph.topological() if node.op_type in ("Softmax", "Attention")]
    return Recognition((), (), tuple(Unrecognised(label(node), refusal) for node in softmaxes))
