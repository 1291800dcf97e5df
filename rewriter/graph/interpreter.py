"""Runs ONNX graphs in torch, node by node: the engine behind recognition, calibration and every exactness check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

import rewriter.graph.operators  # noqa: F401  (registers the operators)
from rewriter.core.errors import DataError, ModelError, UserError
from rewriter.graph.onnx import OnnxGraph, TensorSpec, reads
from rewriter.graph.operators.registry import Call, Environment, Implementation, decode, find
from rewriter.graph.tensors import to_torch

_ORDINARY = (torch.float16, torch.bfloat16, torch.float32)
Feeds = Mapping[str, np.ndarray | Tensor]


@dataclass(frozen=True)
class _Step:
    """A node made ready: its implementation, decoded attributes and names."""

    node: ir.Node
    implementation: Implementation
    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[str, ...]  # inputs and what subgraphs take from outside


class _Values(dict[str, Tensor]):
    """Values by name over constants, which are looked up only when asked for."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.constants = constants

    def __missing__(self, name: str) -> Tensor:
        return self.constants[name]


class Interpreter:
    """Evaluates one graph, and nodes on top of it.

    `dtype` (usually ``torch.float64``) replaces every float dtype: of initialisers, constants, inputs and targets of
    casts. With `requires_grad` every float initialiser of rank >= 1 is a leaf that collects gradients; otherwise runs
    are under ``torch.inference_mode``. `constants` holds the initialisers by name; they share the model's memory.
    A mapping given in their place is asked only for what a run reads, so that it may make them one by one.
    Raises `UnsupportedOperator` for an operator it does not know, on construction. The graph must not be edited
    afterwards.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.dtype, self.requires_grad = graph, dtype, requires_grad
        loaded = self._load_constants(graph.model.graph) if constants is None else {}
        if requires_grad:
            for name, tensor in loaded.items():
                if tensor.is_floating_point() and tensor.ndim >= 1:
                    loaded[name] = tensor.clone().requires_grad_(True)
        self.constants: Mapping[str, Tensor] = loaded if constants is None else constants
        self._steps: dict[int, _Step] = {}
        self._plans: dict[tuple[str, ...], list[ir.Node]] = {}
        self._subgraph_constants: dict[int, tuple[ir.Graph, dict[str, Tensor]]] = {}
        self._nodes = graph.topological()
        for node in self._nodes:
            self._step(node)

    def run(self, feeds: Feeds, taps: Collection[str] | Literal["all"] = ()) -> dict[str, Tensor]:
        """Outputs and tapped values by name. Only nodes they need are run; values are freed after their last use.

        ``taps="all"`` runs and keeps everything. Raises `DataError` when `feeds` do not fit the inputs.
        """
        everything = taps == "all"
        wanted = list(dict.fromkeys([spec.name for spec in self.graph.outputs] + ([] if everything else list(taps))))
        for name in wanted:
            self.graph.value(name)
        env = self.bind(feeds)
        self.run_nodes(self._nodes if everything else self._plan(wanted), env, None if everything else wanted)
        if everything:
            return {**env, **{name: env[name] for name in wanted}}
        return {name: env[name] for name in wanted}

    def _plan(self, wanted: list[str]) -> list[ir.Node]:
        key = tuple(wanted)
        if key not in self._plans:
            self._plans[key] = needed_nodes(self._nodes, wanted)
        return self._plans[key]

    def bind(self, feeds: Feeds) -> Environment:
        """Checked inputs plus constants: the environment in which nodes run."""
        env = _Values(self.constants)
        for spec in self.graph.inputs:
            if spec.name not in feeds:
                raise DataError(f"the model's input {spec.name!r} is missing", f"Give {spec}")
            env[spec.name] = self._fed(spec, feeds[spec.name])
        unknown = sorted(set(feeds) - {spec.name for spec in self.graph.inputs})
        if unknown:
            raise DataError(f"the model has no input {unknown[0]!r}", f"Its inputs are {self._input_names()}")
        return env

    def _fed(self, spec: TensorSpec, array: np.ndarray | Tensor) -> Tensor:
        """An input in its declared dtype: wider or narrower numbers are converted, other kinds refused."""
        tensor = self.tensor(array)
        declared = to_torch(np.zeros(0, spec.dtype)).dtype if spec.dtype != object else tensor.dtype
        if spec.shape and tensor.ndim != len(spec.shape):
            raise DataError(f"input {spec.name!r} has {tensor.ndim} axes, not {len(spec.shape)}", f"Give {spec}")
        if declared.is_floating_point and tensor.is_floating_point():
            return tensor.to(self.dtype or declared)
        if tensor.dtype == declared:
            return tensor
        if declared in (torch.int32, torch.int64) and tensor.dtype in (torch.int32, torch.int64):
            return tensor.to(declared)
        raise DataError(f"input {spec.name!r} is {tensor.dtype}, not {spec.dtype}", f"Give {spec}")

    def tensor(self, array: np.ndarray | Tensor) -> Tensor:
        """An input or constant as this interpreter computes with it."""
        if isinstance(array, Tensor):
            return array.to(self.dtype) if self.dtype is not None and array.is_floating_point() else array
        return to_torch(np.asarray(array), self.dtype)

    def run_nodes(self, nodes: Iterable[ir.Node], env: Environment, keep: Collection[str] | None = None) -> None:
        """Run sorted nodes in `env`, adding what they make. With `keep`, other values are freed after their last use.

        The nodes need not belong to the graph. Raises `ModelError` naming the node that fails.
        """
        steps = [self._step(node) for node in nodes]
        dead = _last_uses(steps, {*keep, *self.constants}) if keep is not None else {}
        with torch.enable_grad() if self.requires_grad else torch.inference_mode():
            for index, step in enumerate(steps):
                self._run_step(step, env)
                for name in dead.get(index, ()):
                    env.pop(name, None)

    def forget(self, nodes: Iterable[ir.Node]) -> None:
        """Let go of nodes that do not belong to the graph and were run on top of it."""
        for node in nodes:
            self._steps.pop(id(node), None)

    def _run_step(self, step: _Step, env: Environment) -> None:
        try:
            inputs = [env[name] if name else None for name in step.inputs]
            scope = ({name: env[name] for name in step.reads},) if step.implementation.scoped else ()
            result = step.implementation.function(step.call, *scope, *inputs)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as problem:
            raise _failure(step, env, problem) from problem
        results = result if isinstance(result, (tuple, list)) else (result,)
        for index, name in enumerate(step.outputs):
            tensor = results[index] if index < len(results) else None
            if name and tensor is None:
                raise _failure(step, env, ValueError(f"output {index} ({name!r}) is not computed"))
            if tensor is not None and name:
                env[name] = tensor.to(self.dtype) if self.dtype and tensor.dtype in _ORDINARY else tensor

    def _step(self, node: ir.Node) -> _Step:
        step = self._steps.get(id(node))
        if step is None or step.node is not node:
            opset = self._opset(node)
            call = Call(node, decode(node.attributes), opset, self.dtype, self._run_graph)
            inputs = tuple("" if value is None else value.name or "" for value in node.inputs)
            while inputs and not inputs[-1]:
                inputs = inputs[:-1]
            outputs = tuple(value.name or "" for value in node.outputs)
            step = _Step(node, find(node, opset), call, inputs, outputs, tuple(reads(node)))
            self._steps[id(node)] = step
        return step

    def _opset(self, node: ir.Node) -> int:
        if node.version is not None:
            return node.version
        return self.graph.opset if not node.domain else int(self.graph.model.opset_imports.get(node.domain, 1))

    def _run_graph(self, graph: ir.Graph, env: Environment) -> list[Tensor]:
        """Outputs of a subgraph; `env` holds the outer values and its inputs, and is not changed."""
        entry = self._subgraph_constants.get(id(graph))
        if entry is None:
            entry = self._subgraph_constants[id(graph)] = (graph, self._load_constants(graph))
        local = {**env, **entry[1]}
        for node in graph:
            self._run_step(self._step(node), local)
        return [local[output.name or ""] for output in graph.outputs]

    def _load_constants(self, graph: ir.Graph) -> dict[str, Tensor]:
        tensors = {name: value.const_value for name, value in graph.initializers.items()}
        return {name: to_torch(t.numpy(), self.dtype) for name, t in tensors.items() if t is not None}

    def _input_names(self) -> str:
        return ", ".join(spec.name for spec in self.graph.inputs)


def needed_nodes(nodes: Iterable[ir.Node], wanted: Iterable[str], have: Collection[str] = ()) -> list[ir.Node]:
    """The nodes, in order, without which `wanted` cannot be computed; values in `have` need no computing."""
    needed = set(wanted) - set(have)
    picked = []
    for node in reversed(list(nodes)):
        if any(value.name and value.name in needed for value in node.outputs):
            picked.append(node)
            needed.update(name for name in reads(node) if name not in have)
    return picked[::-1]


def _last_uses(steps: list[_Step], keep: Collection[str]) -> dict[int, list[str]]:
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in (*step.outputs, *step.reads):
            last[name] = index
    dead: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in keep:
            dead.setdefault(index, []).append(name)
    return dead


def _failure(step: _Step, env: Environment, problem: Exception) -> UserError:
    if isinstance(problem, UserError):
        return problem
    shapes = [f"{name}{list(env[name].shape)}" if name in env else f"{name or '-'}" for name in step.inputs]
    label = step.node.name or next((name for name in step.outputs if name), "")
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return ModelError(
        f"node {label!r} ({step.node.op_type}) failed on {', '.join(shapes)}: {first}",
        "Check that the input shapes fit the model",
    )
