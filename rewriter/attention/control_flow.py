"""Attention inside If, Loop and Scan: each body is looked at as part of a graph of its own, with the values around it.

A branch is inlined as if it were taken, a body as its first turn. What is found there is mapped, not rewritten: nothing
shows that the other branch or the next turn would allow the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.attention.trace import label
from rewriter.graph.onnx import OnnxGraph

CONTROL = frozenset(("If", "Loop", "Scan"))


@dataclass(frozen=True)
class Inlined:
    """A graph that computes what a body computes. Names of nodes and values of the body begin with `prefix`.

    `order` is the position of the control-flow node; `from_inputs` says that what the body is given each turn became
    inputs of the graph, in place of what the first turn is given.
    """

    graph: OnnxGraph
    prefix: str
    order: int
    from_inputs: bool = False


def holds_attention(body: ir.Graph) -> bool:
    """Whether a body, or one inside it, holds anything that may be attention."""
    for node in body:
        if node.op_type.endswith("Attention") or node.op_type in ("Softmax", "Exp"):
            return True
        if any(holds_attention(inner) for _, inner in bodies(node)):
            return True
    return False


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The subgraphs of a node, by attribute."""
    for name, attribute in node.attributes.items():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()


def inlined(graph: OnnxGraph, from_inputs: bool = False, within: str = "") -> Iterator[Inlined]:
    """Every body that may hold attention; of a graph that was inlined itself only those `within` its prefix."""
    for position, node in enumerate(graph.topological()):
        if node.op_type not in CONTROL or node.domain or not label(node).startswith(within):
            continue
        for name, body in bodies(node):
            if holds_attention(body):
                prefix = f"{label(node)}/{name}/"
                yield Inlined(_inline(graph, position, name, prefix, from_inputs), prefix, position, from_inputs)


def _inline(graph: OnnxGraph, position: int, attribute: str, prefix: str, from_inputs: bool) -> OnnxGraph:
    copy = graph.clone()
    outer = copy.model.graph
    node = copy.topological()[position]
    body = node.attributes[attribute].as_graph()
    given = _given(outer, node, body, prefix, from_inputs)
    for value, source in zip(body.inputs, given, strict=True):
        value.replace_all_uses_with(source, replace_graph_outputs=True)
    for name, value in list(body.initializers.items()):
        del body.initializers[name]
        value.name = f"{prefix}{name}"
        outer.register_initializer(value)
    nodes, outputs = list(body), list(body.outputs)
    body.outputs.clear()
    body.remove(nodes)
    for inner in nodes:
        inner.name = f"{prefix}{label(inner)}"
    for inner in nodes:
        for value in inner.outputs:
            value.name = f"{prefix}{value.name}" if value.name else ""
    outer.insert_before(node, nodes)
    outer.outputs[:] = list({id(value): value for value in outputs if value.producer() is not None}.values())
    outer.sort()
    RemoveUnusedNodesPass()(copy.model)
    return OnnxGraph(copy.model, graph.path)


def _given(outer: ir.Graph, node: ir.Node, body: ir.Graph, prefix: str, from_inputs: bool) -> list[ir.Value]:
    """What the body's inputs stand for in the first turn, or inputs of the graph in their place."""
    made = _Made(outer, node, prefix)
    if from_inputs:
        return [made.input(value) for value in body.inputs]
    if node.op_type == "Loop":
        start = [made.constant("turn", np.array(0, np.int64)), made.constant("going", np.array(True))]
        return start + [made.required(value) for value in node.inputs[2:]]
    if node.op_type == "Scan":
        count = node.attributes["num_scan_inputs"].as_int()
        states, sequences = node.inputs[: len(node.inputs) - count], node.inputs[len(node.inputs) - count :]
        axes = (
            list(node.attributes["scan_input_axes"].as_ints()) if "scan_input_axes" in node.attributes else [0] * count
        )
        slices = [made.first(made.required(x), axis) for x, axis in zip(sequences, axes, strict=True)]
        return [made.required(value) for value in states] + slices
    return []


class _Made:
    """Values made for the inputs of a body."""

    def __init__(self, outer: ir.Graph, node: ir.Node, prefix: str) -> None:
        self.outer, self.node, self.prefix = outer, node, prefix

    def required(self, value: ir.Value | None) -> ir.Value:
        assert value is not None
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=f"{self.prefix}{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.outer.register_initializer(value)
        return value

    def first(self, sequence: ir.Value, axis: int) -> ir.Value:
        """The first slice of a sequence."""
        index = self.constant(f"{sequence.name}/first", np.array(0, np.int64))
        gather = ir.node("Gather", [sequence, index], {"axis": axis})
        gather.outputs[0].name = gather.name = f"{self.prefix}{sequence.name}/slice"
        self.outer.insert_before(self.node, gather)
        return gather.outputs[0]

    def input(self, value: ir.Value) -> ir.Value:
        """An input of the graph with the type and shape that the body declares."""
        made = ir.Value(name=f"{self.prefix}{value.name}", shape=value.shape, type=value.type)
        self.outer.inputs.append(made)
        return made
