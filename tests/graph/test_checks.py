"""Legality: every kind of damage an edit can do is reported, and all of it at once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.core.errors import ModelError
from rewriter.graph.checks import check_legal, legality_problems
from rewriter.graph.composites import COMPOSITE_DOMAIN, composite
from rewriter.graph.onnx import OnnxGraph
from tests.graph.harness import graph_of

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 3] x) => (float[2, 3] y) <float[3] w = {1, 2, 3}> {
  t = Mul(x, w)
  s = Add(t, w)
  y = Relu(s)
}"""


@pytest.fixture
def graph() -> OnnxGraph:
    return graph_of(onnx.parser.parse_model(TEXT))


def problems(graph: OnnxGraph) -> str:
    return "; ".join(legality_problems(graph))


def test_a_legal_graph(graph: OnnxGraph) -> None:
    check_legal(graph)
    assert problems(graph) == ""


def test_late_inputs(graph: OnnxGraph) -> None:
    inner = graph.model.graph
    mul = graph.topological()[0]
    inner.remove(mul)
    inner.append(mul)
    assert "Add ('s') reads 't', which is not defined before it" in problems(graph)


def test_values_of_another_graph(graph: OnnxGraph) -> None:
    other = graph.clone()
    graph.topological()[1].replace_input_with(0, other.value("t"))
    assert "reads a value 't' that belongs to another graph" in problems(graph)


def test_names_used_twice(graph: OnnxGraph) -> None:
    graph.topological()[1].outputs[0].name = "t"
    assert "'t' is defined twice" in problems(graph)


def test_outputs_nobody_computes(graph: OnnxGraph) -> None:
    graph.model.graph.outputs[0] = ir.Value(name="ghost")
    assert "nothing computes the output 'ghost'" in problems(graph)
    graph.model.graph.outputs.clear()
    assert "the graph has no outputs" in problems(graph)


def test_weights_that_contradict_themselves(graph: OnnxGraph) -> None:
    weight = graph.value("w")
    weight.const_value = ir.tensor(np.zeros((4,), np.float64), name="w")
    found = problems(graph)
    assert "the weight 'w' is DOUBLE but declared FLOAT" in found
    weight.const_value = ir.tensor(np.zeros((4,), np.float32), name="w")
    assert "has shape [4] but is declared [3]" in problems(graph)
    weight.const_value = None
    assert "the weight 'w' has no content" in problems(graph)


def test_nodes_against_their_schema(graph: OnnxGraph) -> None:
    relu = graph.topological()[2]
    relu.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
    assert "Relu ('y') has the attribute alpha, unknown in opset 17" in problems(graph)
    relu.op_type = "Softmin"
    assert "Softmin ('y') does not exist in opset 17" in problems(graph)
    relu.attributes.clear()
    relu.op_type = "Cast"
    assert "Cast ('y') lacks its attribute to" in problems(graph)
    relu.op_type = "Where"
    assert "Where ('y') has 1 inputs, not 3 to 3" in problems(graph)


def test_dtypes(graph: OnnxGraph) -> None:
    graph.value("w").dtype = ir.DataType.DOUBLE
    found = problems(graph)
    assert "Mul ('t') mixes" in found and "FLOAT" in found and "DOUBLE" in found
    relu = graph.topological()[2]
    relu.op_type = "Gather"
    relu.resize_inputs(2)
    relu.replace_input_with(1, graph.value("x"))
    assert "has indices of FLOAT" in problems(graph)


def test_composites(graph: OnnxGraph) -> None:
    relu = graph.topological()[2]
    node = composite("SplitHeads", [graph.value("s")], "heads", heads=3)
    graph.model.graph.insert_after(graph.topological()[1], node)
    assert "which the model does not import" in problems(graph)
    graph.model.opset_imports[COMPOSITE_DOMAIN] = 1
    check_legal(graph)
    del node.attributes["heads"]
    assert "composite SplitHeads ('heads') lacks heads" in problems(graph)
    assert relu.op_type == "Relu"


def test_all_problems_are_listed(graph: OnnxGraph) -> None:
    graph.topological()[2].op_type = "Softmin"
    graph.topological()[1].outputs[0].name = "t"
    with pytest.raises(ModelError, match=r"defined twice.*Softmin"):
        check_legal(graph)


def test_subgraphs_are_checked_too() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x, bool c) => (float[3] y) {
      y = If(c) <then_branch = t () => (float[3] p) { p = Abs(x) }, else_branch = e () => (float[3] q) { q = Neg(x) }>
    }"""
    graph = graph_of(onnx.parser.parse_model(text))
    check_legal(graph)
    branch = graph.topological()[0].attributes["then_branch"].as_graph()
    branch[0].op_type = "Softmin"
    assert "Softmin ('p') does not exist" in problems(graph)
