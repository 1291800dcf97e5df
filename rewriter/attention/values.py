"""The values of one run, computed as far as anybody asks and dropped when the region they belong to is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from rewriter.attention.paths import Paths
from rewriter.graph.interpreter import Interpreter


class Values(dict[str, Tensor]):
    """Values by name. A missing one is computed with all nodes before it; one that was dropped is computed again.

    `shapes` and `floats` remember what is known of every value that ever was.
    """

    def __init__(self, interpreter: Interpreter, paths: Paths, feeds: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.interpreter, self.paths = interpreter, paths
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.floats: set[str] = set()
        self._done = 0
        self._inputs = dict(interpreter.bind(feeds))
        self.update(self._inputs)
        self._note(self._inputs)

    def __missing__(self, name: str) -> Tensor:
        if name in self.interpreter.constants:
            return self.interpreter.constants[name]
        position = self.paths.position(name)
        if position >= self._done:
            self.advance(position + 1)
        if not dict.__contains__(self, name):
            self._again(name)
        return dict.__getitem__(self, name)

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or name in self.paths.producer or name in self.interpreter.constants

    def advance(self, end: int) -> None:
        """Run the nodes before topological index `end` that have not run yet."""
        nodes = self.paths.nodes[self._done : end]
        self._done = max(self._done, end)
        self._run(nodes)

    def add(self, name: str, tensor: Tensor) -> None:
        """A value that no node of the graph makes."""
        self[name] = tensor
        self._note({name: tensor})

    def prune(self, before: int) -> None:
        """Drop what no node from topological index `before` on reads."""
        last_use = self.paths.last_use
        for name in [n for n in self if last_use.get(n, -1) < before and n not in self._inputs]:
            del self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value."""
        if name not in self.shapes:
            self._note({name: self[name]})
        return self.shapes[name]

    def _again(self, name: str) -> None:
        needed: dict[int, ir.Node] = {}
        stack = [name]
        while stack:
            current = stack.pop()
            node = self.paths.producer.get(current)
            if dict.__contains__(self, current) or node is None or self.paths.index[id(node)] in needed:
                continue
            needed[self.paths.index[id(node)]] = node
            stack += self.paths.reads[id(node)]
        if not needed:
            raise KeyError(name)
        self._run([node for _, node in sorted(needed.items())])

    def _run(self, nodes: Iterable[ir.Node]) -> None:
        listed = list(nodes)
        self.interpreter.run_nodes(listed, self)
        names = [str(value.name) for node in listed for value in node.outputs if value.name]
        self._note({name: dict.__getitem__(self, name) for name in names if dict.__contains__(self, name)})

    def _note(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in values.items():
            self.shapes[name] = tuple(tensor.shape)
            if tensor.is_floating_point():
                self.floats.add(name)
