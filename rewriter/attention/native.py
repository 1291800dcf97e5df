"""The model's own matrices behind weight values, in the dtype they are stored in, as views of its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from rewriter.attention.linear_forms import only_matrix
from rewriter.attention.paths import Paths
from rewriter.core.site import Array
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import to_numpy, to_torch


class Stored(Mapping[str, Tensor]):
    """Initialisers by name as they are stored, over the model's memory."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._values = graph.model.graph.initializers

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._values[name].const_value
        if tensor is None:
            raise KeyError(name)
        return to_torch(tensor.numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Native:
    """Evaluates the few nodes between initialisers and the weights that products read."""

    def __init__(self, graph: OnnxGraph, paths: Paths) -> None:
        self.graph, self.paths = graph, paths
        self._interpreter: Interpreter | None = None

    def matrix(self, name: str) -> Array:
        """The matrix behind a weight value: of an initialiser itself, or cut from one by the graph's own nodes."""
        stored = self.graph.constant(name)
        if stored is None:
            stored = self._computed(name)
        return only_matrix(np.asarray(stored))

    def _computed(self, name: str) -> Array:
        if self._interpreter is None:
            self._interpreter = Interpreter(self.graph, constants=Stored(self.graph))
        constants = self._interpreter.constants
        needed: dict[int, ir.Node] = {}
        stack = [name]
        while stack:
            node = self.paths.producer.get(stack.pop())
            if node is not None and self.paths.index[id(node)] not in needed:
                needed[self.paths.index[id(node)]] = node
                stack += self.paths.reads[id(node)]
        nodes = [node for _, node in sorted(needed.items())]
        env = {read: constants[read] for node in nodes for read in self.paths.reads[id(node)] if read in constants}
        self._interpreter.run_nodes(nodes, env)
        return to_numpy(env[name])
