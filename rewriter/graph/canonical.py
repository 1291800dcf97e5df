"""A copy for analysis in which only computing nodes are left. Never what is saved."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from rewriter.graph.onnx import OnnxGraph, constant_of


def canonical(graph: OnnxGraph) -> OnnxGraph:
    """Constants become initialisers; Identity, inference Dropout and no-op Cast go; unused nodes and weights go.

    Every name left in the copy is a name of the original and stands for the same value. A node without effect stays
    where its output is an output of the graph.
    """
    copy = graph.clone()
    if copy.model.functions:
        common.InlinePass()(copy.model)
    for inner in list(copy.model.graphs()):
        for node in list(inner):
            _simplify(inner, node)
    common.RemoveUnusedNodesPass()(copy.model)
    return copy


def _simplify(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type == "Constant" and not node.domain:
        _lift(graph, node)
        return
    source = node.inputs[0] if node.inputs else None
    if source is None or not passes_through(node) or node.outputs[0].is_graph_output():
        return
    node.outputs[0].replace_all_uses_with(source)
    if not any(value.uses() or value.is_graph_output() for value in node.outputs):
        graph.remove(node, safe=True)


def _lift(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    array = constant_of(output)
    if array is None or output.is_graph_output():
        return
    tensor = ir.tensor(array, name=output.name)
    lifted = ir.Value(
        name=output.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    output.replace_all_uses_with(lifted)
    graph.remove(node, safe=True)
    graph.register_initializer(lifted)


def passes_through(node: ir.Node) -> bool:
    """Whether the first output of a node is its first input: Identity, Dropout in inference, Cast to the same dtype."""
    if node.domain:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        return _inference(node)
    return node.op_type == "Cast" and _keeps_dtype(node)


def _inference(node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    array = constant_of(training)
    return array is not None and not array.any()


def _keeps_dtype(node: ir.Node) -> bool:
    source, target = node.inputs[0], node.attributes["to"].as_int()
    assert source is not None
    if source.dtype is not None:
        return source.dtype == target
    producer = source.producer()
    same = producer is not None and producer.op_type == "Cast" and not producer.domain
    return same and producer is not None and producer.attributes["to"].as_int() == target
