"""Control flow: If, Loop and Scan, whose subgraphs see the values around them."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, Environment, operator
from rewriter.graph.tensors import torch_dtype

MOST_ROUNDS = 20_000


@operator("If", scoped=True)
def if_else(call: Call, env: Environment, condition: Tensor) -> list[Tensor]:
    """One of two subgraphs."""
    return call.run_graph(call.need("then_branch" if bool(condition) else "else_branch"), env)


@operator("Loop", scoped=True)
def loop(
    call: Call, env: Environment, trips: Tensor | None = None, condition: Tensor | None = None, *state: Tensor
) -> list[Tensor]:
    """A body repeated while its condition holds, at most `trips` times; what it emits is stacked."""
    body: ir.Graph = call.need("body")
    names = [value.name or "" for value in body.inputs]
    limit = None if trips is None else int(trips)
    going = condition is None or bool(condition)
    carried, emitted, step = list(state), [], 0
    while going and (limit is None or step < limit):
        if step == MOST_ROUNDS:
            raise call.unsupported(f"it goes on for more than {MOST_ROUNDS} rounds")
        inputs = [torch.tensor(step), torch.tensor(going), *carried]
        results = call.run_graph(body, {**env, **dict(zip(names, inputs, strict=True))})
        going, carried = bool(results[0]), results[1 : 1 + len(carried)]
        emitted.append(results[1 + len(carried) :])
        step += 1
    return [*carried, *_stacked(body, emitted, 1 + len(carried))]


def _stacked(body: ir.Graph, emitted: list[list[Tensor]], first: int) -> list[Tensor]:
    if emitted:
        return [torch.stack(column) for column in zip(*emitted, strict=True)]
    return [_empty(value) for value in body.outputs[first:]]


def _empty(value: ir.Value) -> Tensor:
    sizes = [size if isinstance(size, int) else 0 for size in value.shape] if value.shape is not None else []
    return torch.zeros([0, *sizes], dtype=torch_dtype(value.dtype) if value.dtype is not None else torch.float32)


@operator("Scan", since=9, scoped=True)
def scan(call: Call, env: Environment, *inputs: Tensor) -> list[Tensor]:
    """A body over slices of its inputs, with carried state; what it emits is stacked."""
    body: ir.Graph = call.need("body")
    count = call.need("num_scan_inputs")
    state, sequences = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
    axes = call.get("scan_input_axes") or [0] * count
    reverse = call.get("scan_input_directions") or [0] * count
    names = [value.name or "" for value in body.inputs]
    columns = [
        list(x.unbind(axis))[::-1] if back else list(x.unbind(axis))
        for x, axis, back in zip(sequences, axes, reverse, strict=True)
    ]
    emitted = []
    for slices in zip(*columns, strict=True):
        results = call.run_graph(body, {**env, **dict(zip(names, [*state, *slices], strict=True))})
        state = results[: len(state)]
        emitted.append(results[len(state) :])
    return [*state, *_scan_outputs(call, body, emitted, len(state))]


def _scan_outputs(call: Call, body: ir.Graph, emitted: list[list[Tensor]], first: int) -> list[Tensor]:
    if not emitted:
        return [_empty(value) for value in body.outputs[first:]]
    columns = [list(column) for column in zip(*emitted, strict=True)]
    axes = call.get("scan_output_axes") or [0] * len(columns)
    reverse = call.get("scan_output_directions") or [0] * len(columns)
    return [
        torch.stack(column[::-1] if back else column, axis)
        for column, axis, back in zip(columns, axes, reverse, strict=True)
    ]
