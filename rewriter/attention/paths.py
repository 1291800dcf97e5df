"""Producers, consumers and paths of a graph by value name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import onnx_ir as ir

from rewriter.graph.onnx import OnnxGraph, reads


class Paths:
    """The structure of a graph, frozen when made: producers, consumers and topological positions by value name."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.nodes = graph.topological()
        self.index = {id(node): i for i, node in enumerate(self.nodes)}
        self.producer = {str(v.name): node for node in self.nodes for v in node.outputs if v.name}
        self.consumers: dict[str, list[ir.Node]] = defaultdict(list)
        self.reads = {id(node): reads(node) for node in self.nodes}
        self.last_use: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in self.reads[id(node)]:
                self.consumers[name].append(node)
                self.last_use[name] = index
        for value in graph.model.graph.outputs:
            self.last_use[str(value.name)] = len(self.nodes)

    def position(self, name: str) -> int:
        """Topological index of the producer; -1 for inputs and constants."""
        node = self.producer.get(name)
        return -1 if node is None else self.index[id(node)]

    def between(self, source: str, target: str, stop: Collection[str] = ()) -> list[ir.Node] | None:
        """Nodes on the paths from one value to another, in order; None if there is no path.

        `stop` names values that cannot depend on the source (constants), to save the walk behind them.
        """
        low, above, stack, seen = self.position(source), {}, [target], {source}
        while stack:
            name = stack.pop()
            node = self.producer.get(name)
            if name in seen or node is None or name in stop or self.index[id(node)] <= low:
                continue
            seen.add(name)
            above[self.index[id(node)]] = node
            stack += self.reads[id(node)]
        reached, path = {source}, []
        for _, node in sorted(above.items()):
            if any(name in reached for name in self.reads[id(node)]):
                path.append(node)
                reached.update(str(v.name) for v in node.outputs if v.name)
        return path if target in reached else None
