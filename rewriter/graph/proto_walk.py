"""Walking an ONNX message: all nodes, graphs and tensors, wherever they are nested."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def label(node: onnx.NodeProto) -> str:
    """What to call a node in a message: its name, else its first output."""
    return repr(node.name or next((name for name in node.output if name), node.op_type))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs a node holds."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_within(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of the graphs they hold."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from nodes_within(list(graph.node))


def all_nodes(proto: onnx.ModelProto, functions: bool = True) -> Iterator[onnx.NodeProto]:
    """Every node of the model, in subgraphs and, unless told otherwise, functions too."""
    yield from nodes_within(list(proto.graph.node))
    for function in proto.functions if functions else ():
        yield from nodes_within(list(function.node))


def all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph."""
    yield proto.graph
    for node in all_nodes(proto):
        yield from subgraphs(node)


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every weight and every tensor in an attribute."""
    for graph in all_graphs(proto):
        yield from graph.initializer
    for node in all_nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
