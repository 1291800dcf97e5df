"""Inputs of requests at their true sizes: samples of the data cut back to their tokens, or drawn without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.calibration.data import Dataset, draw_inputs
from rewriter.core.lengths import Requests, Size
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.ranges import integer_ranges
from rewriter.search.padding import Axes, shapes_at

Feeds = dict[str, NDArray[Any]]


def known_requests(histogram: Path | None, data: Dataset | None, width: int = 0) -> Requests | None:
    """From ``--shape-histogram``, else the lengths of the data where its padding is known; None if neither says.

    `width` tokens must fit all the same. Raises `DataError` for a malformed file.
    """
    if histogram is not None:
        found = Requests.load(histogram)
        return Requests(found.counts, found.source, width)
    lengths = data.lengths() if data is not None else None
    if lengths is None or not lengths.size:
        return None
    found = Requests.of_lengths(np.maximum(lengths, 1).tolist(), "the data's lengths")
    return Requests(found.counts, found.source, width)


@dataclass(frozen=True)
class RequestMaker:
    """Makes the inputs of requests; `usual` are the shapes of all axes that requests do not vary."""

    graph: OnnxGraph
    usual: Mapping[str, tuple[int, ...]]
    axes: Axes
    data: Dataset | None
    seed: int

    def __call__(self, batch: int, tokens: int, index: int) -> Feeds:
        """Request number `index`: real samples of about these tokens, cut to them, where the data has any so long."""
        return self._real(batch, tokens, index) or self._drawn(batch, tokens, index)

    def _drawn(self, batch: int, tokens: int, index: int) -> Feeds:
        shapes = shapes_at(self.graph.inputs, self.usual, self.axes, (batch, tokens))
        # The first row of a drawn mask is whole, so a request of one row has no padding of its own.
        return draw_inputs(self.graph.inputs, shapes, integer_ranges(self.graph), self.seed + 1000 * index)

    def _real(self, batch: int, tokens: int, index: int) -> Feeds:
        lengths = self.data.lengths() if self.data is not None else None
        if self.data is None or lengths is None:
            return {}
        fitting = np.flatnonzero(lengths >= tokens)
        if not fitting.size:
            return {}
        rng = np.random.default_rng([self.seed, index])
        near = fitting[np.argsort(lengths[fitting], kind="stable")][: max(batch, 16)]
        rows = rng.choice(near, batch, replace=batch > near.size)
        shapes = shapes_at(self.graph.inputs, self.usual, self.axes, (batch, tokens))
        cut = {
            name: np.ascontiguousarray(array[rows][tuple(slice(0, size) for size in shapes[name])])
            for name, array in self.data.inputs.items()
        }
        return cut if all(array.shape == shapes[name] for name, array in cut.items()) else {}


def examples(make: RequestMaker, requests: Requests, count: int = 3) -> list[tuple[Size, Feeds]]:
    """A few requests from short to long, to look at what padding does to them."""
    tokens = sorted({requests.quantile(share) for share in np.linspace(0.1, 0.9, count)})
    batch = requests.batches[0]
    return [((batch, size), make(batch, size, index)) for index, size in enumerate(tokens)]
