"""What is timed: shapes for every input, and real inputs at those shapes to rotate through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.calibration.data import Dataset, draw_inputs
from rewriter.core.errors import OptionError
from rewriter.graph.onnx import OnnxGraph, TensorSpec
from rewriter.graph.ranges import integer_ranges

Feeds = dict[str, NDArray[Any]]

_ROTATED = 8


@dataclass(frozen=True)
class Workload:
    """Input shapes to optimise for, and a few inputs of those shapes."""

    shapes: Mapping[str, tuple[int, ...]]
    feeds: tuple[Feeds, ...]


def choose_workload(
    graph: OnnxGraph,
    data: Dataset | None,
    asked: Mapping[str, tuple[int, ...]],
    seed: int = 0,
    usual: Mapping[str, int] | None = None,
) -> Workload:
    """Shapes from `asked` (``--shape``), else one sample of the data, else the model's own static ones.

    `usual` has sizes of named axes for what nothing else says. Equal names of dynamic axes are bound together. Raises
    `OptionError` if a size stays unknown or does not fit.
    """
    sizes = _bound_sizes(graph.inputs, asked)
    if data is not None and not asked:
        first = {name: (1, *array.shape[1:]) for name, array in data.inputs.items()}
        sizes = _bound_sizes(graph.inputs, first)
    sizes = {**(usual or {}), **sizes}
    shapes = {spec.name: _resolve(spec, sizes) for spec in graph.inputs}
    feeds = _from_data(data, shapes, seed) if data is not None else []
    if not feeds:
        ranges = integer_ranges(graph)
        feeds = [draw_inputs(graph.inputs, shapes, ranges, seed + i) for i in range(_ROTATED)]
    return Workload(shapes, tuple(feeds))


def _bound_sizes(specs: Sequence[TensorSpec], asked: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of named axes (and of nameless ones, as ``input/axis``) that the asked shapes fix."""
    known = {spec.name: spec for spec in specs}
    sizes: dict[str, int] = {}
    for name, shape in asked.items():
        if name not in known:
            raise OptionError(f"the model has no input {name!r}", f"Its inputs are {', '.join(map(str, specs))}")
        spec = known[name]
        if len(shape) != len(spec.shape):
            raise OptionError(f"--shape {name} has {len(shape)} sizes, the input is {spec}", "Give one size per axis")
        for axis, (size, want) in enumerate(zip(shape, spec.shape, strict=True)):
            if isinstance(want, int) and want != size:
                raise OptionError(f"axis {axis} of {name} is fixed to {want}, not {size}", f"Use {want}")
            key = want if isinstance(want, str) else f"{name}/{axis}"
            if sizes.setdefault(key, size) != size:
                raise OptionError(f"axis {key!r} was given as {sizes[key]} and as {size}", "Make them equal")
    return sizes


def _resolve(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for axis, want in enumerate(spec.shape):
        key = want if isinstance(want, str) else f"{spec.name}/{axis}"
        size = want if isinstance(want, int) else sizes.get(key)
        if size is None:
            example = "x".join("1" if axis == 0 else "128" for axis in range(len(spec.shape)))
            raise OptionError(
                f"the sizes of input {spec} are not known", f"Give --data, or sizes like --shape {spec.name}={example}"
            )
        shape.append(int(size))
    return tuple(shape)


def _from_data(data: Dataset, shapes: Mapping[str, tuple[int, ...]], seed: int) -> list[Feeds]:
    """Random samples stacked to the wanted batch; empty if the data has other sizes than those wanted."""
    if any(array.shape[1:] != shapes[name][1:] for name, array in data.inputs.items()):
        return []
    rng = np.random.default_rng(seed)
    batch = next(iter(shapes.values()))[0]
    rows = [rng.integers(0, len(data), batch) for _ in range(_ROTATED)]
    return [{name: np.ascontiguousarray(array[row]) for name, array in data.inputs.items()} for row in rows]
