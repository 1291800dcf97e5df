"""Filling requests up to a size that was built: along which axes, and whether the model's answers stay the same.

What is shown is what artifacts do: every input filled with zeros behind its end, every output cut back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.calibration.data import Dataset
from rewriter.core.errors import OptionError, UserError
from rewriter.core.lengths import Requests, Size
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, TensorSpec

Feeds = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]
Outputs = dict[str, tuple[int | str | None, ...]]

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


def outputs_of(graph: OnnxGraph, axes: Axes, short: tuple[Size, Feeds], long: tuple[Size, Feeds]) -> Outputs:
    """The axes of each output by name, where they follow those of requests in two runs of other sizes.

    Exporters often give the axes of outputs names of their own. Raises `UserError` when the model cannot be run.
    """
    interpreter = Interpreter(graph)
    sizes = [axes.sizes(size) for size, _ in (short, long)]
    shapes = [{name: tuple(v.shape) for name, v in interpreter.run(feeds).items()} for _, feeds in (short, long)]
    named: Outputs = {}
    for spec in graph.outputs:
        before, after = (found[spec.name] for found in shapes)
        pairs = list(zip(before, after, strict=True)) if len(before) == len(after) else []
        named[spec.name] = tuple(_label(pair, sizes) for pair in pairs)
    return named


def _label(pair: tuple[int, int], sizes: Sequence[Mapping[str, int]]) -> int | str | None:
    if pair[0] == pair[1]:
        return pair[0]
    return next((name for name in sizes[0] if pair == (sizes[0][name], sizes[1][name])), None)


def name_outputs(graph: OnnxGraph, outputs: Outputs) -> None:
    """Write the found axes into the graph, from where artifacts take them."""
    for value in graph.model.graph.outputs:
        labels = outputs.get(value.name or "", ())
        declared = value.shape.rank() if value.shape is not None else len(labels)
        if labels and declared == len(labels):
            value.shape = ir.Shape(labels)


def harm_of_padding(graph: OnnxGraph, axes: Axes, outputs: Outputs, requests: Sequence[Feeds], to: Size) -> str:
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
            for name, labels in outputs.items():
                problem = _differs(name, labels, true[name], found[name], sizes)
                if problem:
                    return problem
    except UserError as error:
        return f"the model could not be run at these sizes: {error}"
    return ""


def _differs(
    name: str, labels: Sequence[int | str | None], true: NDArray[Any], found: NDArray[Any], sizes: Mapping[str, int]
) -> str:
    named = {axis for axis, label in enumerate(labels) if label in sizes}
    if found.ndim != true.ndim:
        return f"output {name} has another number of axes when inputs are padded"
    cut = found[tuple(slice(0, size) if axis in named else slice(None) for axis, size in enumerate(true.shape))]
    if cut.shape != true.shape:
        return f"output {name} changes its shape with padding along an axis that no input has"
    if not true.size:
        return ""
    wide, wanted = cut.astype(np.float64), true.astype(np.float64)
    # Equal infinities are equal, though their difference is not a number.
    gap = float(np.max(np.where(wide == wanted, 0.0, np.abs(wide - wanted))))
    largest = float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0))
    # Not a number is no small gap.
    if not gap <= TOLERANCE * largest:
        return f"output {name} changes by {gap:.2g} (largest value {largest:.2g}) when inputs are padded"
    return ""
