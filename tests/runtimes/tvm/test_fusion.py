"""Peepholes: what they find, what they must leave alone, and that the meaning stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.fusion import fuse
from rewriter.runtimes.tvm.specialise import specialise
from tests.runtimes.tvm.harness import assert_same, numbers

CONSTANTS = {
    "w": numbers(8, 8, seed=1), "v": numbers(8, 8, seed=2), "row": numbers(8, seed=3), "gain": numbers(8, seed=4),
    "eps": np.float32(1e-5), "two": np.float32(2.0), "axis": np.array([-1], np.int64), "onef": np.float32(1.0),
}  # fmt: skip
Written = list[tuple[str, list[str], str]]
LAYER_NORM: Written = [
    ("ReduceMean", ["x", "axis"], "m"), ("Sub", ["x", "m"], "d"), ("Pow", ["d", "two"], "q"),
    ("ReduceMean", ["q", "axis"], "v2"), ("Add", ["v2", "eps"], "e"), ("Sqrt", ["e"], "s"), ("Div", ["d", "s"], "n"),
    ("Mul", ["n", "gain"], "g"), ("Add", ["g", "row"], "out"),
]  # fmt: skip
RMS_NORM: Written = [
    ("Mul", ["x", "x"], "q"), ("ReduceMean", ["q", "axis"], "v2"), ("Add", ["v2", "eps"], "e"), ("Sqrt", ["e"], "s"),
    ("Div", ["onef", "s"], "r"), ("Mul", ["x", "r"], "n"), ("Mul", ["gain", "n"], "out"),
]  # fmt: skip
NO_NORM: Written = [*LAYER_NORM[:2], ("Pow", ["x", "two"], "q"), *LAYER_NORM[3:]]  # the mean square of x, not of d
LINEAR: Written = [
    ("MatMul", ["x", "w"], "a"),
    ("Add", ["row", "a"], "b"),
    ("Gelu", ["b"], "c"),
    ("Add", ["x", "c"], "out"),
]
SHARED: Written = [("MatMul", ["x", "w"], "a"), ("Add", ["a", "row"], "b"), ("Add", ["b", "a"], "out")]
TWICE: Written = [("MatMul", ["x", "w"], "a"), ("Add", ["a", "a"], "out")]
SQUARE: Written = [("MatMul", ["x", "w"], "a"), ("MatMul", ["x", "v"], "c"), ("Add", ["a", "c"], "out")]
EQUAL: Written = [("MatMul", ["x", "w"], "a"), ("MatMul", ["x", "w"], "c"), ("Mul", ["a", "c"], "out")]


def graph(written: Written) -> OnnxGraph:
    nodes = [helper.make_node(op, inputs, [output]) for op, inputs, output in written]
    used = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes, "fusion", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 5, 8])],
        [helper.make_empty_tensor_value_info("out")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in CONSTANTS.items() if name in used],
    )  # fmt: skip
    return OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))


@pytest.mark.parametrize(("written", "kinds"), [
    (LAYER_NORM, ["rewriter:Norm"]),
    (RMS_NORM, ["rewriter:Norm"]),
    (NO_NORM, ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]),
    (LINEAR, ["rewriter:Linear"]),
    (SHARED, ["rewriter:Linear", "Add", "Add"]),
    (TWICE, ["rewriter:Linear", "Add"]),
    (SQUARE, ["rewriter:Linear", "rewriter:Linear"]),
    (EQUAL, ["rewriter:Linear", "Mul"]),
])  # fmt: skip
def test_fused_as_written(written: Written, kinds: list[str]) -> None:
    model, x = graph(written), np.abs(numbers(2, 5, 8)) + 0.5
    program = specialise(model, {"x": x.shape})
    fuse(program)
    assert [node.key for node in program.nodes] == kinds
    assert_same(model, {"x": x}, 2e-5)
