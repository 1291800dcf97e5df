"""A variant whose caches have other sizes than the model's: what it is fed, at which shapes, and what to say of it.

Data and workloads hold caches of the model as it was. A rewritten projection makes a linear map of what the old one
made (`Projection.cache_map`), so an old cache becomes a new one without running anything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.attention.caches import CachePort, cache_ports
from rewriter.calibration.data import Dataset
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.onnx import OnnxGraph, TensorSpec

Maps = Mapping[str, NDArray[Any]]  # by the name of an input, (heads, dim, new heads, new dim)


def cache_maps(graph: OnnxGraph, sites: Iterable[Site]) -> dict[str, NDArray[Any]]:
    """For every cache that enters `graph` and that a rewrite changed, the map from the old to the new one."""
    found: dict[str, NDArray[Any]] = {}
    for site in sites:
        if not isinstance(site, AttentionSite):
            continue
        maps = {"key": site.key.cache_map, "value": site.value.cache_map}
        for port in cache_ports(graph, site) if any(one is not None for one in maps.values()) else ():
            made = maps[port.role]
            if port.input and made is not None:
                found[port.input] = made
    return found


def converted(feeds: Mapping[str, NDArray[Any]], maps: Maps) -> dict[str, NDArray[Any]]:
    """The feeds with caches (B, heads, T, dim) as a variant takes them."""
    return {name: _mapped(array, maps[name]) if name in maps else array for name, array in feeds.items()}


def converted_data(data: Dataset, maps: Maps) -> Dataset:
    """The samples with caches as a variant takes them."""
    if not maps:
        return data
    axes = dict(data.axes)
    for name, made in maps.items():
        old = axes[name]
        axes[name] = (old[0], made.shape[2], old[2], made.shape[3])
    return replace(data, inputs=converted(data.inputs, maps), axes=axes)


def fitted_shapes(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Shapes for a graph whose fixed axes may differ from those of the graph that the shapes were chosen for."""
    specs = {spec.name: spec.shape for spec in inputs}
    found = {}
    for name, shape in shapes.items():
        fixed = specs.get(name, ())
        same = len(fixed) == len(shape)
        sizes = zip(shape, fixed, strict=True) if same else ()
        found[name] = tuple(new if isinstance(new, int) else old for old, new in sizes) if same else shape
    return found


def cache_report(graph: OnnxGraph, before: Iterable[Site], after: Mapping[str, Site]) -> list[dict[str, Any]]:
    """For every cache whose sizes changed: names, sizes per token before and after, and bytes per token."""
    found = []
    for site in before:
        new = after.get(site.id)
        if not isinstance(site, AttentionSite) or not isinstance(new, AttentionSite) or not site.cached:
            continue
        for old_port, new_port in zip(cache_ports(graph, site), cache_ports(graph, new), strict=True):
            if (old_port.heads, old_port.dim) != (new_port.heads, new_port.dim):
                found.append(_entry(graph, site, old_port, new_port))
    return found


def _entry(graph: OnnxGraph, site: Site, old: CachePort, new: CachePort) -> dict[str, Any]:
    specs = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    size = specs[old.input or old.output].dtype.itemsize
    return {
        "site": site.id,
        "role": old.role,
        "input": old.input,
        "output": old.output,
        "heads": [old.heads, new.heads],
        "dim": [old.dim, new.dim],
        "bytes_per_token": [old.width * size, new.width * size],
    }


def _mapped(cache_BGTD: NDArray[Any], made: NDArray[Any]) -> NDArray[Any]:
    rows = np.tensordot(cache_BGTD, made.astype(cache_BGTD.dtype), axes=((1, 3), (0, 1)))  # (B, T, heads, dim)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3))
