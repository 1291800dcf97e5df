"""Lookups in a loaded graph, and copies of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from rewriter.core.errors import ModelError
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import TensorSpec, load, reads
from tests.graph.files import proto_of, written
from tests.graph.harness import numbers


def test_what_a_loaded_graph_says(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    assert graph.inputs == (TensorSpec("x", np.dtype(np.float32), ("N", 3)),)
    assert graph.outputs == (TensorSpec("y", np.dtype(np.float32), ("N", 3)),)
    assert str(graph.inputs[0]) == "x: float32[Nx3]"
    assert graph.opset == 17
    assert [node.op_type for node in graph.topological()] == ["Identity", "Constant", "Mul", "Add", "Relu"]
    assert [value.name for value in graph.values()] == ["x", "w", "a", "c", "t", "s", "y"]


def test_lookups(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    np.testing.assert_array_equal(graph.constant("c"), [1, 2, 4])
    assert graph.constant("t") is None and graph.constant("nope") is None
    assert graph.has("t") and not graph.has("nope")
    assert graph.value("t").producer() is graph.topological()[2]
    with pytest.raises(ModelError, match="no value named 'nope'"):
        graph.value("nope")
    flow = graph.dataflow()
    assert set(flow.predecessors("t")) == {"a", "w"}
    assert flow.edges["t", "s"]["node"].op_type == "Add"


def test_lookups_follow_edits(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    relu = graph.topological()[-1]
    assert graph.value("y") is relu.outputs[0]
    relu.outputs[0].name = "renamed"
    assert graph.has("renamed") and not graph.has("y")


def test_a_clone_can_be_edited_alone(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    before = graph.fingerprint()
    copy = graph.clone()
    assert copy.fingerprint() == before
    copy.topological()[-1].op_type = "Tanh"
    assert copy.fingerprint() != before and graph.fingerprint() == before


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    proto = proto_of()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
    graph = load(written(tmp_path, proto))
    assert [spec.name for spec in graph.inputs] == ["x"]
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    found = Interpreter(graph).run({"x": numbers(2, 3)})
    assert found["y"].shape == (2, 3)


def test_subgraphs_read_what_is_around_them(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x, bool c) => (float[3] y) {
      a = Neg(x)
      y = If(c) <then_branch = t () => (float[3] p) { p = Abs(a) }, else_branch = e () => (float[3] q) { q = Abs(x) }>
    }"""
    graph = load(written(tmp_path, proto_of(text)))
    assert reads(graph.topological()[1]) == ["c", "a", "x"]
    assert set(graph.dataflow().predecessors("y")) == {"c", "a", "x"}
