"""Resize: linear along every axis, so one matrix per axis, read off the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tvm import relax

from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
_LEFT_OUT = ("axes", "keep_aspect_ratio_policy")


@lowers("Resize", "Upsample")
def _resize(lowering: Lowering, node: Node) -> Any:
    """Multiplied by the matrix of each axis whose size changes."""
    if node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize" or node.opset < 9:
        raise lowering.unsupported(node, "regions cut out, or scales of opset 8 and before")
    before, after = lowering.shape(node.inputs[0]), lowering.shape(node.outputs[0])
    scales = _scales(lowering, node, before, after)
    result, dtype = lowering.value(node.inputs[0]), lowering.dtype(node.inputs[0])
    for axis, (size, target, scale) in enumerate(zip(before, after, scales, strict=True)):
        if size == target and scale == 1.0:
            continue
        matrix = lowering.array(axis_matrix(node, size, scale).astype(dtype))
        order = [*(i for i in range(len(before)) if i != axis), axis]
        back = [order.index(i) for i in range(len(before))]
        product = op.matmul(op.permute_dims(result, order), op.permute_dims(matrix, [1, 0]))
        result = lowering.builder.emit(op.permute_dims(lowering.builder.emit(product), back))
    return result


def _scales(lowering: Lowering, node: Node, before: tuple[int, ...], after: tuple[int, ...]) -> list[float]:
    """Per axis: given, or by the sizes."""
    index = 2 if node.op == "Resize" and node.opset >= 11 else 1
    given = lowering.constant(node, index)
    if given is None or not given.size:
        lowering.constant(node, 3)
        return [target / size for size, target in zip(before, after, strict=True)]
    scales, axes = [1.0] * len(before), node.attributes.get("axes") or range(len(before))
    for axis, scale in zip(integers(axes), given.reshape(-1), strict=True):
        scales[axis] = float(scale)
    return scales


def axis_matrix(node: Node, size: int, scale: float) -> NDArray[np.float64]:
    """(target, size): what a resize along one axis makes of each unit vector."""
    old = node.op == "Upsample" or node.opset < 11
    scales = numpy_helper.from_array(np.array([scale, 1.0], np.float32), "scales")
    attributes = {name: value for name, value in node.attributes.items() if name not in _LEFT_OUT}
    made = helper.make_node(node.op, ["x", "scales"] if old else ["x", "", "scales"], ["y"], **attributes)
    info = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [size, size])
    body = helper.make_graph([made], "axis", [info], [helper.make_empty_tensor_value_info("y")], [scales])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", node.opset)], ir_version=9)
    run = Interpreter(OnnxGraph(ir.from_proto(proto))).run({"x": np.eye(size, dtype=np.float32)})
    return np.asarray(run["y"].numpy(), np.float64)
