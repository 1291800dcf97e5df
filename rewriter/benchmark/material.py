"""What the entrants of one work are given: the graph in the form each takes, and inputs to rotate through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.benchmark.works import Work
from rewriter.calibration.data import draw_inputs, read_npz
from rewriter.core.errors import ModelError
from rewriter.core.site import Precision, State
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.graph.ranges import integer_ranges
from rewriter.measurement.bench import save_feeds

Feeds = dict[str, NDArray[Any]]
ROTATED, SAMPLES = 8, 32


@dataclass(frozen=True)
class Material:
    """Files below one folder: `exact` by number format, one file of `feeds` per run, `samples` to calibrate on."""

    original: Path
    exact: Mapping[Precision, Path]
    feeds: tuple[Path, ...]
    samples: Path
    shapes: dict[str, tuple[int, ...]]


def prepare(work: Work, models: Path, folder: Path) -> Material:
    """Write what `work` needs to `folder`. Raises `ModelError` when the model is not there."""
    original = models / work.model / f"{work.model}.onnx"
    if not original.exists():
        raise ModelError(f"{original} does not exist", f"Run python -m models {work.model} -o {original.parent}")
    graph = load(original)
    shapes = {spec.name: work.sizes[: len(spec.shape)] for spec in graph.inputs}
    batches = _batches(graph, original.with_name("data.npz"), shapes)
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / "samples.npz"
    rows = _batches(graph, original.with_name("data.npz"), {name: (SAMPLES, *s[1:]) for name, s in shapes.items()})[0]
    np.savez(samples, allow_pickle=False, **rows)
    return Material(original, _exact(graph, work, folder), save_feeds(batches, folder / "feeds"), samples, shapes)


def _exact(graph: OnnxGraph, work: Work, folder: Path) -> dict[Precision, Path]:
    """The graph with every block as composites, in each number format that some entrant computes in."""
    wanted: list[Precision] = [entrant.graph for entrant in work.entrants if entrant.graph != "original"]
    paths = {precision: folder / f"{precision}.onnx" for precision in wanted}
    if all(path.exists() for path in paths.values()):
        return paths
    sites = [site for site in recognise(graph).sites if site.state is State.LOWERABLE]
    for precision, path in paths.items():
        lower(graph, [replace(site, precision=precision) for site in sites]).save(path)
    return paths


def _batches(graph: OnnxGraph, data: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Feeds]:
    """Samples of the data at these shapes, texts cut or repeated to the length; drawn where there are no data."""
    if not data.exists():
        ranges = integer_ranges(graph)
        return [draw_inputs(graph.inputs, shapes, ranges, seed) for seed in range(ROTATED)]
    arrays, rng = read_npz(data), np.random.default_rng(0)
    known = {name: arrays[name] for name in shapes}
    return [_drawn(known, shapes, rng) for _ in range(ROTATED)]


def _drawn(
    arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> Feeds:
    batch = next(iter(shapes.values()))[0]
    chosen = rng.integers(0, len(next(iter(arrays.values()))), batch)
    return {name: _fitted(array[chosen], shapes[name]) for name, array in arrays.items()}


def _fitted(rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Rows cut or repeated along their last axis."""
    repeats = -(-shape[-1] // rows.shape[-1])
    return np.ascontiguousarray(np.concatenate([rows] * repeats, axis=-1)[..., : shape[-1]])
