"""A graph as a torch program: the interpreter's operators, recorded once at given shapes, without the interpreter.

Every operator runs once on real inputs. What depends on the inputs is recorded as a call of torch (`aten.linear`,
`aten.layer_norm`, `aten.scaled_dot_product_attention` stay whole); what depends on constants and shapes alone is
computed here, once, and is a constant of the program. A choice made by looking at the value of an input would hold for
that value only, and is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.composites import is_composite
from rewriter.graph.interpreter import Interpreter, needed_nodes
from rewriter.graph.onnx import OnnxGraph, reads
from rewriter.runtimes.torch_attention import FusedAttention

_aten = torch.ops.aten
# What makes Python numbers of tensors; `tolist` shows itself only by the step before it.
_LOOKS = (
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.resolve_conj.default,
)


class _LookedAtData(Exception):
    """The program would be another one for other values of the same shapes."""


def trace(graph: OnnxGraph, feeds: Mapping[str, np.ndarray]) -> fx.GraphModule:
    """A module over the inputs in their order that returns a tuple of the outputs, for the shapes of `feeds`.

    Numbers keep the dtypes of the graph. Raises `UnsupportedOperator` for operators the interpreter does not know or
    whose work depends on values, `DataError` for feeds that do not fit.
    """
    interpreter = Interpreter(graph)
    env = interpreter.bind(feeds)
    recorder = Recorder()
    for spec in graph.inputs:
        recorder.input(spec.name, env[spec.name])
    fused = FusedAttention(recorder.depends)
    wanted = [spec.name for spec in graph.outputs]
    nodes = needed_nodes(graph.topological(), wanted)
    last = {name: index for index, node in enumerate(nodes) for name in reads(node)}
    with torch.inference_mode():
        for index, node in enumerate(nodes):
            _record(recorder, interpreter, fused, node, env)
            for name in reads(node):
                if last[name] == index and name not in wanted:
                    env.pop(name, None)
    return recorder.module([env[name] for name in wanted])


def _record(
    recorder: Recorder, interpreter: Interpreter, fused: FusedAttention, node: ir.Node, env: dict[str, Tensor]
) -> None:
    """Run one node, leaving its calls with the recorder and its results in `env`."""
    try:
        with recorder:
            if is_composite(node, "Attention"):
                operands = [None if value is None or not value.name else env[value.name] for value in node.inputs]
                env[str(node.outputs[0].name)] = fused(node, operands)
            else:
                interpreter.run_nodes([node], env)
    except _LookedAtData as problem:
        name = node.name or node.outputs[0].name or ""
        raise UnsupportedOperator("torch", node.op_type, name, f"its work depends on data ({problem})") from None


class Recorder(TorchDispatchMode):
    """Records calls on tensors that depend on the program's inputs; other calls just run.

    Meant for inference mode, where torch shows calls whole, as they were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._constants: dict[str, Tensor] = {}
        self._nodes: WeakIdKeyDictionary = WeakTensorKeyDictionary()

    def input(self, name: str, tensor: Tensor) -> None:
        """Make a tensor an argument of the program."""
        self._nodes[tensor] = self._graph.placeholder(f"input_{name}")

    def depends(self, tensor: Tensor | None) -> bool:
        """Whether a value depends on the inputs, not only on their shapes."""
        node = None if tensor is None else self._nodes.get(tensor)
        return node is not None and node.op != "get_attr"

    def module(self, outputs: list[Tensor]) -> fx.GraphModule:
        """The program: only what its outputs need."""
        self._graph.output(tuple(self._node(tensor) for tensor in outputs))
        self._graph.eliminate_dead_code()
        root = nn.Module()
        with torch.inference_mode(False):
            for name in {node.target for node in self._graph.nodes if node.op == "get_attr"}:
                root.register_buffer(str(name), _own(self._constants[str(name)]))
        return fx.GraphModule(root, self._graph)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call, and record it if one of its tensors depends on the inputs."""
        given = dict(kwargs or {})
        if not any(isinstance(leaf, Tensor) and self.depends(leaf) for leaf in tree_leaves((args, given))):
            return func(*args, **given)
        if func in _LOOKS or _sized_by_data(func, args):
            raise _LookedAtData(func.name())
        if func._schema.is_mutable and not self.depends(args[0]):
            raise _LookedAtData(f"{func.name()} writes into a constant")
        result = func(*args, **given)
        node = self._graph.call_function(func, *tree_map_only(Tensor, self._node, (args, given)))
        self._track_results(result, node)
        return result

    def _track_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._nodes[result] = node
            return
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                self._nodes[part] = self._graph.call_function(operator.getitem, (node, index))

    def _node(self, tensor: Tensor) -> fx.Node:
        """What stands for a value in the program; a constant becomes a buffer of it."""
        node = self._nodes.get(tensor)
        if node is None:
            name = f"constant_{len(self._constants)}"
            self._constants[name] = tensor
            node = self._nodes[tensor] = self._graph.get_attr(name)
        return node


def _sized_by_data(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of a result follows from values."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func not in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        return True
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _own(tensor: Tensor) -> Tensor:
    """A constant in memory of its own, laid out as torch lays out weights."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
