"""What requests the result will serve, and whether they may be padded: known before the search starts."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.calibration.data import Dataset
from rewriter.core.errors import OptionError, UnsupportedOperator, UserError
from rewriter.core.lengths import Requests
from rewriter.core.options import Options
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.search.padding import Axes, Outputs, axes_of, check_batches, harm_of_padding, outputs_of
from rewriter.search.requests import RequestMaker, examples, known_requests
from rewriter.search.workload import Workload, choose_workload

_FAR = 1024  # padding is looked at up to so many tokens, or a little beyond the request where that is longer


@dataclass(frozen=True)
class Traffic:
    """The sizes of requests with the axes they vary, and what makes their inputs.

    `outputs` names the axes of outputs that follow them. `harm` says why padding changes the model's answers; empty
    where it does not. `asked`: by ``--shape-histogram``.
    """

    requests: Requests
    axes: Axes
    make: RequestMaker
    outputs: Outputs
    harm: str
    asked: bool


def choose_traffic(graph: OnnxGraph, data: Dataset | None, options: Options) -> tuple[Workload, Traffic | None]:
    """The shapes to optimise for and the requests to serve; no traffic where nothing says what lengths will come.

    Raises `OptionError` and `DataError` for a histogram that is malformed or does not fit the model.
    """
    asked = options.shape_histogram is not None
    requests = known_requests(options.shape_histogram, data)
    axes = axes_of(graph.inputs, data) if requests is not None else None
    if asked and axes is None:
        hint = "Export the model with a dynamic axis of tokens, or leave --shape-histogram out"
        raise OptionError(f"no input of the model has a named second axis: {', '.join(map(str, graph.inputs))}", hint)
    if requests is None or axes is None:
        return choose_workload(graph, data, options.shapes, options.seed), None
    sizes = axes.sizes((requests.usual_batch, requests.longest))
    workload = choose_workload(graph, data, options.shapes, options.seed, sizes)
    batch, width = _usual(graph, workload, axes)
    check_batches(requests, axes, batch)
    requests = Requests(requests.counts, requests.source, width)
    make = RequestMaker(graph, workload.shapes, axes, data, options.seed)
    if asked:
        _check_longest(graph, requests, make)
    outputs, harm = _padding(graph, axes, requests, make)
    return workload, Traffic(requests, axes, make, outputs, harm, asked)


def _check_longest(graph: OnnxGraph, requests: Requests, make: RequestMaker) -> None:
    batch, tokens = max(requests.counts, key=lambda size: (size[1], -size[0]))
    try:
        Interpreter(graph).run(make(batch, tokens, 0))
    except UnsupportedOperator:
        return  # of which every stage to come says what it means
    except UserError as error:
        what = f"{requests.source} has requests of {tokens} tokens, which the model cannot run: {error.what}"
        raise OptionError(what, "Leave out what it cannot serve") from error


def _usual(graph: OnnxGraph, workload: Workload, axes: Axes) -> tuple[int, int]:
    """(batch, tokens) of the shapes to optimise for."""
    for spec in graph.inputs:
        if axes.tokens in spec.shape[1:]:
            shape = workload.shapes[spec.name]
            return shape[0], shape[spec.shape.index(axes.tokens)]
    raise AssertionError(f"no input has the axis {axes.tokens}")


def _padding(graph: OnnxGraph, axes: Axes, requests: Requests, make: RequestMaker) -> tuple[Outputs, str]:
    """The axes of outputs and the harm: of short requests filled up in tokens, and in samples if batches differ."""
    largest, (batch, tokens) = requests.batches[-1], min(requests.counts)
    step = 1 if tokens < requests.longest else -1 if tokens > 1 else 0
    other = (batch + (axes.batch is not None), tokens + step)
    try:
        sizes = ((batch, tokens), other)
        outputs = outputs_of(graph, axes, *[(size, make(*size, 0)) for size in sizes])
    except UserError as error:
        return {}, f"the model could not be run at two sizes: {error}"
    for (batch, tokens), feeds in examples(make, requests):
        rows = min(largest, batch + 2) if axes.batch is not None else batch
        to = (rows, min(requests.longest, max(_FAR, tokens + 64)))
        problem = harm_of_padding(graph, axes, outputs, [feeds], to) if to != (batch, tokens) else ""
        if problem:
            return outputs, problem
    return outputs, ""
