"""Norms that exporters wrote in single operators, found again.

Layer norm: ``d = x - mean(x); y = d / sqrt(mean(d^2) + eps) * gain [+ bias]``; RMS norm the same with d = x.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.runtimes.tvm.program import Node, Program


def find_norms(program: Program) -> None:
    """Put norm nodes in place of their spelled-out forms; what nobody reads any more is pruned later."""
    finder = _Finder(program)
    program.nodes = [finder.norm(node) or node for node in program.nodes]


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program, self.producers = program, program.producers()

    def norm(self, node: Node) -> Node | None:
        """The norm that ends in this node, with its bias if the node adds one, else with its gain."""
        program = self.program
        if node.key not in ("Add", "Mul") or program.dtype(node.outputs[0]) != np.float32:
            return None
        if node.key == "Mul":
            found = self._scaled(node)
            return None if found is None else self._node(node, *found, "")
        for one, other in (node.inputs, node.inputs[::-1]):
            product = self.producers.get(one)
            if product is None or product.key != "Mul" or not self._row(other, node):
                continue
            found = self._scaled(product)
            if found is not None:
                return self._node(node, *found, other)
        return None

    def _node(self, node: Node, kind: str, x: str, epsilon: float, gain: str, bias: str) -> Node:
        attributes = {"kind": kind, "epsilon": epsilon}
        return replace(node, op="Norm", domain="rewriter", inputs=(x, "", gain, bias), attributes=attributes)

    def _row(self, name: str, node: Node) -> bool:
        """A constant with one value per channel of the node's result."""
        shape = self.program.shape(node.outputs[0])
        return self.program.constant(name) is not None and self.program.shape(name) == shape[-1:]

    def _scaled(self, node: Node) -> tuple[str, str, float, str] | None:
        """(kind, x, epsilon, gain) of gain * normalised."""
        for one, other in (node.inputs, node.inputs[::-1]):
            if self._row(one, node):
                found = self._normalised(other)
                if found is not None:
                    return (*found, one)
        return None

    def _normalised(self, name: str) -> tuple[str, str, float] | None:
        """(kind, x, epsilon) of d / sqrt(mean(d^2) + epsilon)."""
        node = self.producers.get(name)
        if node is None or node.key not in ("Div", "Mul"):
            return None
        pairs = [node.inputs] if node.key == "Div" else [node.inputs, node.inputs[::-1]]
        for centred, scale in pairs:
            root = scale if node.key == "Div" else self._inverse(scale)
            epsilon = self._deviation(root, centred)
            if epsilon is None:
                continue
            source = self._centred(centred)
            return ("layer", source, epsilon) if source else ("rms", centred, epsilon)
        return None

    def _inverse(self, name: str) -> str:
        """a where name = 1 / a."""
        node = self.producers.get(name)
        if node is not None and node.key == "Reciprocal":
            return node.inputs[0]
        if node is not None and node.key == "Div" and self._scalar(node.inputs[0]) == 1.0:
            return node.inputs[1]
        return ""

    def _deviation(self, name: str, centred: str) -> float | None:
        """Epsilon where name = sqrt(mean(centred^2) + epsilon)."""
        root = self.producers.get(name)
        if root is None or not (root.key == "Sqrt" or (root.key == "Pow" and self._scalar(root.inputs[1]) == 0.5)):
            return None
        total = self.producers.get(root.inputs[0])
        if total is None or total.key != "Add":
            return None
        for mean, epsilon in (total.inputs, total.inputs[::-1]):
            amount, square = self._scalar(epsilon), self._mean_of(mean)
            if amount is not None and square and self._is_square(square, centred):
                return amount
        return None

    def _is_square(self, name: str, of: str) -> bool:
        node = self.producers.get(name)
        if node is None:
            return False
        if node.key == "Pow":
            return node.inputs[0] == of and self._scalar(node.inputs[1]) == 2.0
        return node.key == "Mul" and node.inputs == (of, of)

    def _centred(self, name: str) -> str:
        """x where name = x - mean(x), else the empty name."""
        node = self.producers.get(name)
        if node is None or node.key != "Sub" or self._mean_of(node.inputs[1]) != node.inputs[0]:
            return ""
        return node.inputs[0]

    def _mean_of(self, name: str) -> str:
        """x where name is its mean over the last axis, kept."""
        node = self.producers.get(name)
        if node is None or node.key != "ReduceMean" or not int(node.attributes.get("keepdims", 1)):
            return ""
        given = self.program.constant(node.input(1))
        axes = list(node.attributes.get("axes", ())) if given is None else [int(axis) for axis in given.reshape(-1)]
        last = len(self.program.shape(node.inputs[0])) - 1
        return node.inputs[0] if axes in ([-1], [last]) else ""

    def _scalar(self, name: str) -> float | None:
        array = self.program.constant(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
