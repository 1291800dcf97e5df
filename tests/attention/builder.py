"""Graphs written node by node, the way converters of other frameworks write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rewriter.graph.onnx import OnnxGraph, load


class Builder:
    """Collects nodes and constants; every method that makes a value returns its name. Weights are drawn, seed fixed."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, array: object, dtype: type = np.float32) -> str:
        name = f"const_fold_opt__{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int, dtype: type = np.float32) -> str:
        drawn = self.random.standard_normal(shape) * (1.5 * shape[0] ** -0.5 if len(shape) > 1 else 0.2)
        return self.constant(drawn, dtype)

    def gain(self, size: int) -> str:
        return self.constant(1 + 0.2 * self.random.standard_normal(size))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: object) -> list[str]:
        names = [f"StatefulPartitionedCall/model/{kind}_{len(self.nodes)}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def shaped(self, x: str, *sizes: int) -> str:
        """A reshape to sizes known when the model was converted; 0 keeps an axis, -1 is what is left."""
        return self.op("Reshape", x, self.constant(sizes, np.int64))

    def like(self, x: str, leading: str, count: int, *sizes: int) -> str:
        """A reshape to the first `count` axes of another value, then `sizes`: Shape, Slice, Concat, as TensorFlow
        models compute them."""
        shape = self.op("Cast", self.op("Shape", leading), to=TensorProto.INT32)
        parts = [self.sliced(shape, i, i + 1, 0) for i in range(count)]
        target = self.op("Concat", *parts, self.constant(sizes, np.int32), axis=0)
        return self.op("Reshape", x, self.op("Cast", target, to=TensorProto.INT64))

    def sliced(self, x: str, start: int, end: int, axis: int) -> str:
        bounds = [self.constant([number], np.int64) for number in (start, end, axis)]
        return self.op("Slice", x, *bounds)

    def squeezed(self, x: str, axis: int) -> str:
        if self.opset < 13:
            return self.op("Squeeze", x, axes=[axis])
        return self.op("Squeeze", x, self.constant([axis], np.int64))

    def unsqueezed(self, x: str, *axes: int) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=list(axes))
        return self.op("Unsqueeze", x, self.constant(axes, np.int64))

    def reduced(self, kind: str, x: str, axis: int) -> str:
        if kind == "ReduceSum" and self.opset >= 13:
            return self.op(kind, x, self.constant([axis], np.int64), keepdims=1)
        return self.op(kind, x, axes=[axis], keepdims=1)

    def graph(self, output: str, shape: list[int | str], folder: Path) -> OnnxGraph:
        """The finished graph, checked and read back."""
        self.nodes.append(helper.make_node("Identity", [output], ["output"]))
        result = helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "tf2onnx", self.inputs, [result], self.constants)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=min(8, helper.find_min_ir_version_for([opset]))
        )
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / "model.onnx")
        return load(folder / "model.onnx")
