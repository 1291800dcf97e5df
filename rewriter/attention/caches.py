"""Where a site's cache enters and leaves the graph, whether its sizes may change, and how they change.

A cache is (B, heads, tokens, dim): a value put before the new tokens on axis 2, and the value that holds both. Its
sizes are the model's signature if these are an input and an output of the model, bare or through a cast; anything in
between (a slice of a sliding window, a dequantisation) means that the cache is more than this site knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.core.operand import Projection
from rewriter.core.refusal import Refusal
from rewriter.core.site import AttentionSite, RaisedSite, Site, State
from rewriter.graph.composites import is_composite
from rewriter.graph.onnx import OnnxGraph, constant_of


@dataclass(frozen=True)
class CachePort:
    """One side of a site's cache in the signature; names are "" where it does not enter or leave."""

    role: Literal["key", "value"]
    input: str
    output: str
    heads: int
    dim: int

    @property
    def width(self) -> int:
        """How many numbers a token takes."""
        return self.heads * self.dim


def cache_ports(graph: OnnxGraph, site: AttentionSite) -> tuple[CachePort, ...]:
    """The inputs and outputs that hold the site's keys and values, with the sizes that the site gives them."""
    found = []
    sides: tuple[tuple[Literal["key", "value"], Projection], ...] = (("key", site.key), ("value", site.value))
    for role, operand in sides:
        if operand.past or operand.present:
            entry = _input_of(graph, operand.past) if operand.past else None
            leave = _output_of(graph, operand.present) if operand.present else None
            into, out_of = ("" if value is None else str(value.name) for value in (entry, leave))
            found.append(CachePort(role, into, out_of, operand.heads, operand.dim))
    return tuple(found)


def cached_width(sites: Sequence[Site]) -> int:
    """Numbers cached per token by all sites together."""
    return sum(
        operand.heads * operand.dim
        for site in sites
        if isinstance(site, AttentionSite)
        for operand in (site.key, site.value)
        if operand.past or operand.present
    )


def cache_problem(lowered: OnnxGraph, shaped: OnnxGraph, site: AttentionSite) -> Refusal | None:
    """Why the sizes of a site's cache must stay, or None.

    Judged on a graph in which the site was written anew, and on one from before shapes were rebuilt, where numbers
    that only stand for the cache's sizes can still be told from others.
    """
    for operand in (site.key, site.value):
        if operand.past and _input_of(lowered, operand.past) is None:
            why = "what is cached is computed from the model's inputs, such as cut from a longer cache or dequantised"
            return Refusal("cache-computed", why, (operand.past,))
        if operand.present and _output_of(lowered, operand.present) is None:
            why = "the cache is changed, such as cut or quantised, before it is given away, or not given away at all"
            return Refusal("cache-computed", why, (operand.present,))
        for name in (operand.past, operand.present):
            readers = [*_other_readers(lowered, site, name), *_size_readers(shaped, name)] if name else []
            if readers:
                why = "something else reads the content of the cache, or how large its heads are"
                return Refusal("cache-read-elsewhere", why, (readers[0],))
    return None


def with_cache_problems(graph: OnnxGraph, sites: Sequence[RaisedSite]) -> list[RaisedSite]:
    """The sites, those with a cache told why its sizes must stay, if there is a reason."""
    from rewriter.attention.lower import lower, put_in_place

    cached = [site for site in sites if isinstance(site, AttentionSite) and site.cached]
    ready = [site for site in cached if site.state is State.LOWERABLE]
    if not ready:
        return list(sites)
    lowered, shaped = lower(graph, ready), put_in_place(graph, ready)
    RemoveUnusedNodesPass()(shaped.model)
    found = {site.id: problem for site in ready if (problem := cache_problem(lowered, shaped, site)) is not None}
    return [replace(site, problems=(*site.problems, found[site.id])) if site.id in found else site for site in sites]


def resize(lowered: OnnxGraph, site: Site) -> None:
    """Give inputs and outputs of a graph, which holds the site anew, the sizes of its cache; in place."""
    if not isinstance(site, AttentionSite):
        return
    for operand in (site.key, site.value):
        if operand.cache_map is None:
            continue
        for name in (operand.past, operand.present):
            value = lowered.value(name) if name else None
            for one in _chain(lowered, value):
                if one.shape is not None:
                    sizes = list(one.shape)
                    sizes[1], sizes[3] = operand.heads, operand.dim
                    one.shape = ir.Shape(sizes)


def _chain(graph: OnnxGraph, value: ir.Value | None) -> Iterator[ir.Value]:
    """A cached value and its copies, to the model's input and outputs."""
    if value is None:
        return
    yield value
    yield from _originals(value)
    yield from _copies(value)


def _originals(value: ir.Value) -> Iterator[ir.Value]:
    before = _copied(value.producer())
    if before is not None:
        yield before
        yield from _originals(before)


def _copies(value: ir.Value) -> Iterator[ir.Value]:
    for node, _ in value.uses():
        if _copied(node) is value:
            yield node.outputs[0]
            yield from _copies(node.outputs[0])


def _copied(node: ir.Node | None) -> ir.Value | None:
    """What a node only copies, or casts: exporters join a cache with nothing before they use it."""
    if node is None or node.domain or node.op_type not in ("Identity", "Cast", "Concat"):
        return None
    full = [value for value in node.inputs if value is not None and not _empty(value)]
    return full[0] if len(full) == 1 else None


def _empty(value: ir.Value) -> bool:
    array = constant_of(value)
    return array is not None and array.size == 0


def _input_of(graph: OnnxGraph, name: str) -> ir.Value | None:
    value = graph.value(name)
    value = [value, *_originals(value)][-1]
    return value if value.is_graph_input() and not value.is_initializer() else None


def _output_of(graph: OnnxGraph, name: str) -> ir.Value | None:
    value = graph.value(name)
    return next((one for one in (value, *_copies(value)) if one.is_graph_output()), None)


def _other_readers(graph: OnnxGraph, site: AttentionSite, name: str) -> Iterator[str]:
    """Nodes beside the site that read the content of a cache, or how large its heads are."""
    value = graph.value(name)
    for one in dict.fromkeys((value, *_chain(graph, value))):
        for node, _ in one.uses():
            own = str(node.outputs[0].name).startswith(f"{site.id}/") or node.outputs[0].name in _made(site)
            if own or _copied(node) is one or is_composite(node, "Attention") or _only_lengths(node):
                continue
            yield str(node.name or node.outputs[0].name)


def _size_readers(graph: OnnxGraph, name: str) -> Iterator[str]:
    """Nodes that ask how many heads a cache has, or how large they are."""
    for one in _chain(graph, graph.value(name)):
        for node, _ in one.uses():
            if node.op_type == "Shape" and not node.domain and not _only_lengths(node):
                yield str(node.name or node.outputs[0].name)


def _made(site: AttentionSite) -> tuple[str, ...]:
    return tuple(operand.present for operand in (site.key, site.value) if operand.present)


def _only_lengths(node: ir.Node) -> bool:
    """Whether a node asks for a shape of which only the axes of batch and tokens are read."""
    if node.op_type != "Shape" or node.domain:
        return False
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else 4
    axes = list(range(4))[start:end]
    if not {1, 3} & set(axes):
        return True
    if node.outputs[0].is_graph_output():
        return False
    return all(_picks_lengths(reader, axes) for reader, _ in node.outputs[0].uses())


def _picks_lengths(reader: ir.Node, axes: list[int]) -> bool:
    """Whether a reader of a shape picks axes of batch and tokens alone, by constant indices."""
    if reader.domain or reader.op_type not in ("Gather", "Slice"):
        return False
    numbers = [None if value is None else constant_of(value) for value in reader.inputs[1:]]
    if not numbers or any(array is None for array in numbers):
        return False
    arrays = [array.reshape(-1) for array in numbers if array is not None]
    if reader.op_type == "Gather":
        picked = [axes[int(index)] for index in arrays[0]]
    else:
        step = int(arrays[3][0]) if len(arrays) > 3 else 1
        picked = axes[slice(int(arrays[0][0]), int(arrays[1][0]), step)]
    return not {1, 3} & set(picked)
