"""Filling requests up to a size that was built: along which axes, and whether the model's answers stay the same.

What is shown is what artifacts do: every input filled with zeros behind its end, every output cut back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.calibration.data import Dataset
from rewriter.core.errors import OptionError, UserError
from rewriter.core.lengths import Requests, Size
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, TensorSpec

Feeds = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

TOLERANCE = 1e-4  # relative to an output's largest value: sums in another order, no more


@dataclass(frozen=True)
class Axes:
    """The named axes along which requests differ: tokens, and samples unless the model fixes their number."""

    tokens: str
    batch: str | None

    def sizes(self, size: Size) -> dict[str, int]:
        """Sizes of the axes for (batch, tokens)."""
        return {self.tokens: size[1]} | ({self.batch: size[0]} if self.batch is not None else {})


def axes_of(inputs: Sequence[TensorSpec], data: Dataset | None = None) -> Axes | None:
    """The axes of requests: the one the data is padded along, else the named second axis of most inputs; None if none.

    Integer inputs count more: they hold tokens and masks.
    """
    found = Counter[str]()
    for spec in inputs:
        label = spec.shape[1] if len(spec.shape) > 1 else None
        if isinstance(label, str):
            found[label] += 3 if spec.dtype.kind in "iub" else 1
    padded = data.padded_axis if data is not None else None
    if padded is None and not found:
        return None
    tokens = padded or found.most_common(1)[0][0]
    first = {spec.shape[0] for spec in inputs if spec.shape and tokens in spec.shape[1:]}
    batch = first.pop() if len(first) == 1 else None
    return Axes(tokens, batch if isinstance(batch, str) and batch != tokens else None)


def shapes_at(inputs: Sequence[TensorSpec], usual: Mapping[str, tuple[int, ...]], axes: Axes, size: Size) -> Shapes:
    """The usual shapes with the axes of requests at (batch, tokens)."""
    sizes = axes.sizes(size)
    return {
        spec.name: tuple(
            sizes.get(label, was) if isinstance(label, str) else was
            for label, was in zip(spec.shape, usual[spec.name], strict=True)
        )
        for spec in inputs
    }


def check_batches(requests: Requests, axes: Axes, usual_batch: int) -> None:
    """Raise `OptionError` when requests have batches that the model does not take."""
    other = [batch for batch in requests.batches if batch != usual_batch]
    if axes.batch is None and other:
        raise OptionError(
            f"{requests.source} has requests of batch {other[0]}, the model takes batch {usual_batch} alone",
            "Export the model with a dynamic batch, or leave those requests out",
        )


def padded(feeds: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> Feeds:
    """Inputs filled with zeros behind their end up to these shapes."""
    filled = {name: np.zeros(shapes[name], array.dtype) for name, array in feeds.items()}
    for name, array in feeds.items():
        filled[name][tuple(slice(0, size) for size in array.shape)] = array
    return filled


def harm_of_padding(graph: OnnxGraph, axes: Axes, requests: Sequence[Feeds], to: Size) -> str:
    """Why filling these requests up to (batch, tokens) changes the model's answers; empty when it does not."""
    interpreter = Interpreter(graph)
    sizes = axes.sizes(to)
    try:
        for feeds in requests:
            usual = {name: array.shape for name, array in feeds.items()}
            whole = padded(feeds, shapes_at(graph.inputs, usual, axes, to))
            true, found = (
                {name: value.numpy() for name, value in interpreter.run(one).items()} for one in (feeds, whole)
            )
            for spec in graph.outputs:
                problem = _differs(spec, true[spec.name], found[spec.name], sizes)
                if problem:
                    return problem
    except UserError as error:
        return f"the model could not be run at these sizes: {error}"
    return ""


def _differs(spec: TensorSpec, true: NDArray[Any], found: NDArray[Any], sizes: Mapping[str, int]) -> str:
    named = {axis for axis, label in enumerate(spec.shape) if label in sizes}
    if found.ndim != true.ndim:
        return f"output {spec.name} has another number of axes when inputs are padded"
    cut = found[tuple(slice(0, size) if axis in named else slice(None) for axis, size in enumerate(true.shape))]
    if cut.shape != true.shape:
        return f"output {spec.name} changes its shape with padding along an axis that no input has"
    if not true.size:
        return ""
    wide, wanted = cut.astype(np.float64), true.astype(np.float64)
    # Equal infinities are equal, though their difference is not a number.
    gap = float(np.max(np.where(wide == wanted, 0.0, np.abs(wide - wanted))))
    largest = float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0))
    # Not a number is no small gap.
    if not gap <= TOLERANCE * largest:
        return f"output {spec.name} changes by {gap:.2g} (largest value {largest:.2g}) when inputs are padded"
    return ""
