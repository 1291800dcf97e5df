"""One plan for several graphs of one decoder: what was solved on one of them is carried over to the others.

Optimum writes a decoder as up to three files: one that takes no cache, one that takes a cache, and both merged into an
`If`. They hold the same weights, so their sites are the same but for names; a rewrite is carried over as the difference
that it made. A cache then means the same in every graph, whichever made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.assembly.plan_file import changes_between, with_changes
from rewriter.attention.caches import cache_ports
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.errors import ModelError
from rewriter.core.site import AttentionSite, RaisedSite, Site, State
from rewriter.graph.merged import join_merged, split_merged
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.runtimes.standard import to_standard

DECODER_FILES = ("decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx")


@dataclass(frozen=True)
class Sibling:
    """Another file of the same decoder: one graph, or the two branches of a `merged` one, each with its sites."""

    file: str
    graphs: tuple[OnnxGraph, ...]
    sites: tuple[tuple[RaisedSite, ...], ...]
    merged: OnnxGraph | None = None


@dataclass(frozen=True)
class Decoder:
    """The graph that plans are made on, and the other files that follow it.

    `together` says that all of them were asked for: a folder, or a merged file.
    """

    graph: OnnxGraph
    siblings: tuple[Path, ...] = ()
    together: bool = False


def open_decoder(model: Path) -> Decoder:
    """The graph at `model`, and which files beside it are of the same decoder.

    Of a folder in Optimum's layout, and of a merged file, the graph is the one that takes no cache. Raises
    `ModelError` like `load`.
    """
    file = model
    if model.is_dir() and not (model / "model.onnx").is_file():
        file = next((model / name for name in DECODER_FILES if (model / name).is_file()), model)
    graph = load(file)
    own = graph.path or file
    beside = [own.parent / name for name in DECODER_FILES] if own.name in DECODER_FILES else []
    others = tuple(path for path in beside if path.is_file() and path != own)
    branches = split_merged(graph)
    if branches is None:
        return Decoder(graph, others, model.is_dir())
    without = min((branch.graph for branch in branches), key=lambda one: len(one.inputs))
    return Decoder(without, (own, *others), True)


def read_siblings(files: Sequence[Path], sites: Sequence[RaisedSite], seed: int = 0) -> tuple[Sibling, ...]:
    """The other files with their sites. Raises `ModelError` if one of them does not hold the same decoder."""
    found = []
    for file in files:
        graph = load(file)
        branches = split_merged(graph)
        graphs = (graph,) if branches is None else tuple(branch.graph for branch in branches)
        own = tuple(recognise(one, None, seed).sites for one in graphs)
        for others in own:
            _check_alike(file, sites, others)
        found.append(Sibling(file.name, graphs, own, None if branches is None else graph))
    return tuple(found)


def carried_over(before: Sequence[RaisedSite], after: Mapping[str, Site], others: Sequence[RaisedSite]) -> list[Site]:
    """The sites of another graph with the differences that a rewrite made to those of the first."""
    known = {site.id: site for site in before}
    found: list[Site] = []
    for site in others:
        new = after.get(site.id)
        if new is None or site.state is not State.LOWERABLE:
            found.append(site)
            continue
        made = dict(changes_between(known[site.id], new))
        found.append(with_changes(site, made, Path(site.id)) if made else site)
    return [site for site in found if getattr(site, "state", None) is State.LOWERABLE]


def rewritten(sibling: Sibling, before: Sequence[RaisedSite], after: Mapping[str, Site]) -> OnnxGraph:
    """The sibling with the same rewrite, in standard operators; a merged file with both branches rewritten."""
    made = [
        to_standard(lower(graph, carried_over(before, after, sites)))
        for graph, sites in zip(sibling.graphs, sibling.sites, strict=True)
    ]
    return made[0] if sibling.merged is None else join_merged(sibling.merged, (made[0], made[1]))


def cache_names(graph: OnnxGraph, sites: Sequence[Site]) -> dict[tuple[str, str], tuple[str, str]]:
    """By site and role the input and the output of its cache."""
    return {
        (site.id, port.role): (port.input, port.output)
        for site in sites
        if isinstance(site, AttentionSite)
        for port in cache_ports(graph, site)
    }


def _check_alike(file: Path, sites: Sequence[RaisedSite], others: Sequence[RaisedSite]) -> None:
    known = {site.id: site for site in others}
    for site in sites:
        if site.state is not State.LOWERABLE:
            continue
        other = known.get(site.id)
        if other is None or type(other) is not type(site) or other.state is not State.LOWERABLE:
            reason = next((str(one) for one in getattr(other, "problems", ())), "it was not found there")
            raise ModelError(
                f"{site.id} cannot be rewritten in {file.name} ({reason})",
                "Export all graphs of the decoder from one model, or rewrite one file without --allow-cache-change",
            )
        if not _same(_weights(site), _weights(other)):
            raise ModelError(
                f"{site.id} has other weights in {file.name}", "Export all graphs of the decoder from one model"
            )


def _weights(site: RaisedSite) -> dict[str, Any]:
    """Every array of a site and what its scores are made by, by path."""
    if isinstance(site, AttentionSite):
        bare = replace(site, problems=(), nodes=())
        facts = {
            "scale": round(site.scale, 6),
            "softcap": site.softcap,
            "heads": site.heads,
            "head_of": site.key.head_of,
        }
        parts = (("query", bare.query), ("key", bare.key), ("value", bare.value), ("output", bare.output))
        arrays = {
            f"{role}.{name}": getattr(part, name)
            for role, part in parts
            for name in ("weight_CGD", "bias_GD", "weight_HDC", "bias_C")
            if isinstance(getattr(part, name, None), np.ndarray)
        }
        return facts | arrays
    return {"up": site.up_CF, "down": site.down_FC, "activation": site.activation}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(_close(one[name], other[name]) for name in one)


def _close(one: Any, other: Any) -> bool:
    """Equal, or weights of equal shape that differ by rounding: recognition may have taken a factor out of them."""
    if not isinstance(one, np.ndarray):
        return bool(one == other)
    size = float(np.abs(one).max(initial=0.0))
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0.0, atol=1e-6 * size))
