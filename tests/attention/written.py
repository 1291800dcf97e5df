"""Small graphs written by hand, operator by operator: attention in spellings that no exporter is needed for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from rewriter.attention.lower import lower
from rewriter.core.site import Recognition
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.standard import to_standard

WIDTH, HEADS, DIM = 24, 4, 6
SCALE = DIM**-0.5


class Net:
    """Collects nodes and constants; every method returns the name of the value it made."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; the name of its output, or a list of them."""
        names = [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        """A constant."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        """A vector of int64."""
        return self.constant(numbers, np.int64)

    def weight(self, *shape: int) -> str:
        """Random numbers, a matrix by its fan-in."""
        return self.constant(self._random.standard_normal(shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.3))

    def linear(self, x: str, inner: int = WIDTH, outer: int = WIDTH) -> str:
        """x @ W + b."""
        return self.op("Add", self.op("MatMul", x, self.weight(inner, outer)), self.weight(outer))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape to constants; 0 copies an axis."""
        return self.op("Reshape", x, self.ints(*shape))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """New axes of length one."""
        return (
            self.op("Unsqueeze", x, self.ints(*axes)) if self.opset >= 13 else self.op("Unsqueeze", x, axes=list(axes))
        )

    def total(self, x: str, axis: int = -1) -> str:
        """A sum that keeps its axis."""
        if self.opset >= 13:
            return self.op("ReduceSum", x, self.ints(axis), keepdims=1)
        return self.op("ReduceSum", x, axes=[axis], keepdims=1)

    def scalar(self, number: float) -> str:
        """One number."""
        return self.constant(number)

    def times(self, x: str, number: float) -> str:
        """x times a number."""
        return self.op("Mul", x, self.scalar(number))

    def heads(self, x: str, heads: int = HEADS, dim: int = DIM) -> str:
        """(B, S, H * D) as (B, H, S, D)."""
        return self.op("Transpose", self.reshape(x, 0, 0, heads, dim), perm=[0, 2, 1, 3])

    def merged(self, context: str, width: int = WIDTH) -> str:
        """(B, H, S, D) as (B, S, H * D)."""
        return self.reshape(self.op("Transpose", context, perm=[0, 2, 1, 3]), 0, 0, width)

    def qkv(self, x: str = "x") -> tuple[str, str, str]:
        """Three projections in heads."""
        query, key, value = (self.heads(self.linear(x)) for _ in range(3))
        return query, key, value

    def content(self, query: str, key: str, scale: float = SCALE) -> str:
        """Scaled scores."""
        return self.times(self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2])), scale)

    def valid(self) -> str:
        """The mask input as floats (B, 1, 1, T)."""
        return self.unsqueeze(self.op("Cast", "mask", to=TensorProto.FLOAT), 1, 2)

    def hidden(self, fill: float = -1e4) -> str:
        """(1 - mask) * fill."""
        return self.times(self.op("Sub", self.scalar(1.0), self.valid()), fill)

    def causal(self) -> str:
        """(S, S), True where the key comes no later than the query."""
        length = self.op("Squeeze", self.op("Slice", self.op("Shape", "x"), self.ints(1), self.ints(2)), self.ints(0))
        steps = self.op("Range", self.constant(0, np.int64), length, self.constant(1, np.int64))
        later = self.op("Less", self.unsqueeze(steps, 1), self.unsqueeze(steps, 0))
        return self.op("Not", later)

    def finish(self, result: str, inputs: Sequence[str] = ("x",), extra: Sequence[str] = ()) -> OnnxGraph:
        """The graph, with `result` as its output; inputs are x (batch, tokens, 24) and mask (batch, tokens)."""
        kinds = {"x": (TensorProto.FLOAT, ["batch", "tokens", WIDTH]), "mask": (TensorProto.INT64, ["batch", "tokens"])}
        self.nodes.append(helper.make_node("Identity", [result], ["output"]))
        outputs = [("output", [None] * 3), *((name, [None] * 4) for name in extra)]
        graph = helper.make_graph(
            self.nodes,
            "written",
            [helper.make_tensor_value_info(name, *kinds[name]) for name in inputs],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in outputs],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(model)
        return OnnxGraph(ir.serde.deserialize_model(model))

    def allowed(self) -> str:
        """The mask input as (B, 1, 1, T), True where a key is valid."""
        return self.unsqueeze(self.op("Cast", "mask", to=TensorProto.BOOL), 1, 2)

    def shape(self, x: str, start: int, end: int) -> str:
        """Some axes of a shape."""
        return self.op("Slice", self.op("Shape", x), self.ints(start), self.ints(end))


Softmax = Callable[[Net, str], str]


def softmax(net: Net, scores: str) -> str:
    """The operator, over the last axis."""
    return net.op("Softmax", scores, axis=-1)


def attention(
    scores: Callable[[Net, str, str], str] = Net.content,
    probabilities: Softmax = softmax,
    after: Callable[[Net, str], str] = lambda net, x: x,
    opset: int = 17,
    masked: bool = True,
) -> OnnxGraph:
    """One attention block with a residual; its scores, softmax and what follows the values as given."""
    net = Net(opset)
    query, key, value = net.qkv()
    mixed = net.op("MatMul", probabilities(net, scores(net, query, key)), value)
    out = net.linear(after(net, net.merged(mixed)))
    return net.finish(net.op("Add", out, "x"), ("x", "mask") if masked else ("x",))


def feeds_of(graph: OnnxGraph, batch: int = 3, tokens: int = 7, nobody: bool = True) -> dict[str, np.ndarray]:
    """Random x; a mask with a hole, with left padding, and without any key where `nobody` asks for it."""
    feeds = {"x": np.random.default_rng(2).standard_normal((batch, tokens, WIDTH)).astype(np.float32)}
    mask = np.ones((batch, tokens), np.int64)
    mask[0, 2], mask[1, :3], mask[2] = 0, 0, int(not nobody)
    return feeds | ({"mask": mask} if len(graph.inputs) == 2 else {})


def onnxruntime_result(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The output of ONNX Runtime, in float32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], feeds)[0])


def assert_lowered_is_the_same(graph: OnnxGraph, found: Recognition) -> OnnxGraph:
    """Lowered and written out, the graph computes what it did in ONNX Runtime at sizes never seen. Gives the former."""
    lowered = lower(graph, found.sites)
    standard, feeds = to_standard(lowered), feeds_of(graph)
    expected = onnxruntime_result(graph, feeds)
    np.testing.assert_allclose(onnxruntime_result(standard, feeds), expected, rtol=1e-4, atol=1e-4)
    return lowered
