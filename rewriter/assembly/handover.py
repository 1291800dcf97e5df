"""Whether a cache that one graph makes continues in another as if there had been one run: checked by running it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from rewriter.core.errors import DataError
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph

Array = np.ndarray
Caches = Mapping[tuple[str, str], tuple[str, str]]  # (site, role) -> (input, output)


def handover_error(
    first: OnnxGraph,
    second: OnnxGraph,
    caches: tuple[Caches, Caches],
    whole: Mapping[str, Array],
    tokens: int,
    steps: int = 1,
) -> float:
    """Largest difference, as a share of the largest output, between one run of `first` and a run cut in two.

    `whole` are its inputs with all tokens on axis 1; `first` reads the leading `tokens`, then `second` goes on, `steps`
    tokens a time, from the caches. Float64. Raises `DataError` if inputs of the graphs cannot be told apart.
    """
    dtype = torch.float64
    one, other = Interpreter(first, dtype), Interpreter(second, dtype)
    everything = one.run(_with_empty(first, caches[0], whole))
    name = next(spec.name for spec in first.outputs if everything[spec.name].is_floating_point())
    length = _length(whole)
    made = one.run(_with_empty(first, caches[0], {key: array[:, :tokens] for key, array in whole.items()}))
    given, found, at = caches[0], [made[name]], tokens
    while at < length:
        end = min(at + steps, length)
        past = {caches[1][key][0]: made[given[key][1]] for key in caches[1] if caches[1][key][0]}
        made = other.run({**_following(second, whole, at, end), **past})
        given, at = caches[1], end
        found.append(made[name])
    joined = torch.cat(found, dim=1)
    if joined.shape != everything[name].shape:
        raise DataError(f"{name!r} has no axis of tokens to compare along", "Compare the graphs by hand")
    return float((joined - everything[name]).abs().max() / everything[name].abs().max().clamp(min=1e-300))


def _length(whole: Mapping[str, Array]) -> int:
    return max(array.shape[1] for array in whole.values() if array.ndim > 1)


def _with_empty(graph: OnnxGraph, caches: Caches, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds with caches of no tokens, where the graph takes any."""
    specs = {spec.name: spec for spec in graph.inputs}
    batch = next(iter(feeds.values())).shape[0]
    found = dict(feeds)
    for entry, _ in caches.values():
        if entry:
            shape = specs[entry].shape
            found[entry] = np.zeros((batch, int(shape[1] or 0), 0, int(shape[3] or 0)), specs[entry].dtype)
    return {name: array for name, array in found.items() if name in specs}


def _following(graph: OnnxGraph, whole: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    """What a graph with a cache reads of the tokens from `start` on: of a mask everything up to them."""
    names = {spec.name for spec in graph.inputs}
    return {
        name: array[:, :end] if "mask" in name else array[:, start:end]
        for name, array in whole.items()
        if name in names
    }
