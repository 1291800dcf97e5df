"""Convolutions as products: which ones become linear layers, and that they compute the same."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.fusion import LINEAR
from rewriter.runtimes.tvm.patches import patches_as_linear
from rewriter.runtimes.tvm.specialise import specialise
from tests.runtimes.tvm.harness import assert_same, numbers

Sizes = tuple[int, ...]


def convolution(x: Sizes, kernel: Sizes, bias: bool, attributes: dict[str, Any]) -> OnnxGraph:
    names = ["x", "kernel", *(["bias"] if bias else [])]
    constants = [numpy_helper.from_array(numbers(*kernel, seed=1), "kernel")]
    constants += [numpy_helper.from_array(numbers(kernel[0], seed=2), "bias")] if bias else []
    made = helper.make_graph(
        [helper.make_node("Conv", names, ["out"], **attributes)], "convolution",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)],
        [helper.make_empty_tensor_value_info("out")], constants,
    )  # fmt: skip
    return OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))


@pytest.mark.parametrize(("x", "kernel", "bias", "attributes", "becomes"), [
    ((2, 3, 6, 8), (5, 3, 2, 4), True, {"strides": [2, 4]}, True),
    ((2, 4, 9), (5, 4, 3), False, {"strides": [3], "auto_pad": "SAME_UPPER"}, True),
    ((1, 2, 4, 3, 6), (3, 2, 2, 1, 3), True, {"strides": [2, 1, 3]}, True),
    ((2, 3, 5, 4), (7, 3, 1, 1), True, {"dilations": [2, 2], "pads": [0, 0, 0, 0]}, True),
    ((2, 3, 7, 8), (5, 3, 2, 4), True, {"strides": [2, 4]}, False),  # a row is left over
    ((2, 3, 6, 8), (5, 3, 2, 4), True, {"strides": [2, 2]}, False),  # windows overlap
    ((2, 3, 6, 8), (5, 3, 2, 2), True, {"strides": [2, 2], "dilations": [2, 2]}, False),
    ((2, 3, 6, 8), (5, 3, 2, 2), True, {"strides": [2, 2], "pads": [1, 1, 1, 1]}, False),
    ((2, 4, 6, 8), (6, 2, 2, 2), True, {"strides": [2, 2], "group": 2}, False),
])  # fmt: skip
def test_windows_side_by_side_become_rows(
    x: Sizes, kernel: Sizes, bias: bool, attributes: dict[str, Any], becomes: bool
) -> None:
    model = convolution(x, kernel, bias, attributes)
    program = specialise(model, {"x": x})
    patches_as_linear(program)
    assert (LINEAR in [node.key for node in program.nodes]) == becomes
    assert_same(model, {"x": numbers(*x)}, 2e-5)


def test_a_computed_kernel_stays_a_convolution() -> None:
    shapes = {"x": (1, 2, 4), "k": (3, 2, 2)}
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node("Conv", ["x", "k"], ["out"], strides=[2])
    made = helper.make_graph([node], "convolution", inputs, [helper.make_empty_tensor_value_info("out")])
    opset = helper.make_opsetid("", 20)
    model = OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[opset], ir_version=9)))
    program = specialise(model, shapes)
    patches_as_linear(program)
    assert [node.key for node in program.nodes] == ["Conv"]
    assert_same(model, {name: numbers(*shape) for name, shape in shapes.items()})
