"""From raised sites back to a graph: regions become composites, and what nothing reads any more is removed.

Nothing of the old region is patched. The new nodes are made from the description alone, under the old name of the
result, so the same site always gives the same bytes, whatever its sizes have become.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache, partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.attention.build import Builder
from rewriter.attention.caches import resize
from rewriter.attention.emit import emit
from rewriter.attention.paths import Paths
from rewriter.attention.shapes import free_shapes, install
from rewriter.core.site import FeedForwardSite, Site
from rewriter.graph.composites import COMPOSITE_DOMAIN, COMPOSITE_VERSION
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Fragment


def lower(graph: OnnxGraph, sites: Iterable[Site], exact: bool = False) -> OnnxGraph:
    """A new graph with composites in place of the sites' regions. The given graph stays as it is.

    Inputs, outputs, dtypes and dynamic axes are unchanged, but for the sizes of caches that a rewrite changed. Weights
    are the sites' own, rounded to the graph's float dtype unless `exact` (only for checks in float64). Raises `Refused`
    for a site without an output projection, `ModelError` for a site of another graph.
    """
    lowered = put_in_place(graph, sites, exact)
    free_shapes(graph, lowered)
    lowered.model.graph.sort()
    RemoveUnusedNodesPass()(lowered.model)
    return lowered


def put_in_place(graph: OnnxGraph, sites: Iterable[Site], exact: bool = False) -> OnnxGraph:
    """The first step of `lower`: regions whose shapes are still asked for stay beside the composites."""
    lowered = graph.clone()
    lowered.model.graph.opset_imports[COMPOSITE_DOMAIN] = COMPOSITE_VERSION
    paths, dtype = cache(partial(Paths, lowered)), None if exact else float_dtype(graph)
    known = {str(value.name): value for value in lowered.values()}
    for site in sites:
        builder = Builder(site.id, lowered.opset, partial(_known, known, lowered), dtype)
        emit(builder, paths, site)
        install(lowered, builder, known)
        resize(lowered, site)
    lowered.model.graph.sort()
    return lowered


def _known(known: dict[str, ir.Value], graph: OnnxGraph, name: str) -> ir.Value:
    return known[name] if name in known else graph.value(name)


def fragment(
    graph: OnnxGraph, site: Site, exact: bool = False, paths: Paths | None = None, old_caches: bool = True
) -> Fragment:
    """One site as nodes of its own, to run on top of the graph's values. Its output is the site's result.

    A cache that the site makes is made anew as well; one that it reads has the sizes it had in the graph, and is
    mapped to its own, unless `old_caches` is False. `paths` spares finding them again. Raises like `lower`.
    """
    dtype = None if exact else float_dtype(graph)
    builder = Builder(site.id, graph.opset, lambda name: ir.Value(name=graph.value(name).name), dtype, old_caches)
    emit(builder, partial(Paths, graph) if paths is None else lambda: paths, site)
    return Fragment(tuple(builder.nodes), builder.constants, (result_of(site),))


def result_of(site: Site) -> str:
    """The graph's name for what a site computes; "" if its output projection is unknown."""
    if isinstance(site, FeedForwardSite):
        return site.output
    return site.output.value if site.output else ""


def float_dtype(graph: OnnxGraph) -> np.dtype[np.generic]:
    """The float dtype that most of the graph's weights are stored in; float32 if it has none."""
    sizes: Counter[ir.DataType] = Counter()
    for value in graph.model.graph.initializers.values():
        if value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point():
            sizes[value.dtype] += value.const_value.size
    return np.dtype(sizes.most_common(1)[0][0].numpy()) if sizes else np.dtype(np.float32)
