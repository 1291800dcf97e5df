"""Running graphs: feeds, taps, precision, gradients, memory, failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.graph.interpreter import Interpreter, needed_nodes
from rewriter.graph.onnx import load
from rewriter.graph.tensors import to_numpy, to_torch
from tests.graph.harness import graph_of, numbers

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {0.5, -0.5}> {
  h = MatMul(x, w)
  unused = Exp(h)
  z = Add(h, b)
  c = Cast<to = 1>(z)
  y = Relu(c)
}"""


@pytest.fixture
def interpreter() -> Interpreter:
    return Interpreter(graph_of(onnx.parser.parse_model(MODEL)))


def expected(x: np.ndarray) -> np.ndarray:
    weight = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    return np.maximum(x @ weight + np.array([0.5, -0.5], np.float32), 0)


def test_outputs_and_taps(interpreter: Interpreter) -> None:
    x = numbers(3, 4)
    found = interpreter.run({"x": x}, taps=["z", "w", "x"])
    assert set(found) == {"y", "z", "w", "x"}
    np.testing.assert_allclose(found["y"], expected(x), rtol=1e-5)
    assert torch.equal(found["x"], torch.from_numpy(x))
    assert "unused" not in interpreter.run({"x": x})


def test_all_values(interpreter: Interpreter) -> None:
    assert set(interpreter.run({"x": numbers(3, 4)}, taps="all")) == {"x", "h", "unused", "z", "c", "y"}


def test_double_precision_reaches_casts_and_outputs() -> None:
    interpreter = Interpreter(graph_of(onnx.parser.parse_model(MODEL)), torch.float64)
    found = interpreter.run({"x": numbers(3, 4)}, taps="all")
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert interpreter.constants["w"].dtype == torch.float64


def test_gradients_reach_weights() -> None:
    interpreter = Interpreter(graph_of(onnx.parser.parse_model(MODEL)), requires_grad=True)
    interpreter.run({"x": np.abs(numbers(3, 4))})["y"].sum().backward()
    gradient = interpreter.constants["w"].grad
    assert gradient is not None
    np.testing.assert_allclose(gradient[:, 0], np.abs(numbers(3, 4)).sum(0), rtol=1e-5)


def test_weights_share_memory_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(onnx.parser.parse_model(MODEL).SerializeToString())
    graph = load(tmp_path / "m.onnx")
    tensor = graph.model.graph.initializers["w"].const_value
    assert tensor is not None
    assert Interpreter(graph).constants["w"].data_ptr() == tensor.numpy().ctypes.data


def test_feeds_that_do_not_fit(interpreter: Interpreter) -> None:
    with pytest.raises(DataError, match="input 'x' is missing"):
        interpreter.run({})
    with pytest.raises(DataError, match="no input 'q'"):
        interpreter.run({"x": numbers(3, 4), "q": numbers(1)})
    with pytest.raises(DataError, match=r"input 'x' has 1 axes, not 2. Give x: float32\[Nx4\]"):
        interpreter.run({"x": numbers(4)})
    with pytest.raises(DataError, match=r"input 'x' is torch.int64, not float32"):
        interpreter.run({"x": np.ones((3, 4), np.int64)})
    assert interpreter.run({"x": numbers(3, 4, dtype=np.float64)})["y"].dtype == torch.float32
    with pytest.raises(ModelError, match=r"MatMul.*x\[3, 5\]"):
        interpreter.run({"x": numbers(3, 5)})
    with pytest.raises(ModelError, match="no value named 'nope'"):
        interpreter.run({"x": numbers(3, 4)}, taps=["nope"])


def test_an_output_the_operator_does_not_have() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[3] b) { a, b = Relu(x) }"""
    with pytest.raises(ModelError, match=r"Relu.*output 1 \('b'\) is not computed"):
        Interpreter(graph_of(onnx.parser.parse_model(text))).run({"x": numbers(3)})


def test_unknown_operators_are_named_before_anything_runs() -> None:
    node = helper.make_node("StringNormalizer", ["x"], ["y"], name="clean")
    info = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    result = helper.make_empty_tensor_value_info("y")
    proto = helper.make_model(helper.make_graph([node], "g", [info], [result]), ir_version=8)
    with pytest.raises(UnsupportedOperator, match=r"StringNormalizer.*'clean'"):
        Interpreter(graph_of(proto))


def test_dead_values_are_freed() -> None:
    nodes = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(20)]
    info = helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("v20", onnx.TensorProto.FLOAT, [2])
    graph = graph_of(helper.make_model(helper.make_graph(nodes, "g", [info], [result]), ir_version=8))
    interpreter = Interpreter(graph)
    env = interpreter.bind({"v0": numbers(2)})
    interpreter.run_nodes(graph.topological(), env, keep=["v20"])
    assert set(env) == {"v20"}


def test_extra_nodes_run_on_top(interpreter: Interpreter) -> None:
    env = interpreter.bind({"x": numbers(3, 4)})
    source = interpreter.graph.value("x")
    node = ir.Node("", "Tanh", [source], outputs=[ir.Value(name="extra")])
    interpreter.run_nodes([node], env)
    np.testing.assert_allclose(env["extra"], np.tanh(numbers(3, 4)), rtol=1e-5)


def test_needed_nodes_stop_at_what_is_there(interpreter: Interpreter) -> None:
    nodes = interpreter.graph.topological()
    assert [node.op_type for node in needed_nodes(nodes, ["y"])] == ["MatMul", "Add", "Cast", "Relu"]
    assert [node.op_type for node in needed_nodes(nodes, ["y"], have=["z"])] == ["Cast", "Relu"]


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "BOOL"])
def test_small_dtypes_come_in_by_value(kind: str) -> None:
    values = [0, 1, 1, 0] if kind == "BOOL" else [1, 2, 3, 4]
    proto = helper.make_tensor("t", getattr(onnx.TensorProto, kind), [4], values)
    tensor = to_torch(numpy_helper.to_array(proto))
    assert tensor.to(torch.float32).tolist() == values


def test_bfloat16_returns_as_bfloat16() -> None:
    array = to_numpy(torch.tensor([1.0, 2.5], dtype=torch.bfloat16))
    assert array.dtype.name == "bfloat16"
    assert array.astype(np.float32).tolist() == [1.0, 2.5]


def test_strings_are_refused() -> None:
    with pytest.raises(ModelError, match="string"):
        to_torch(np.array(["a"], dtype=object))
