"""Attention in model-local functions: nested, with attributes handed down, and as onnxscript writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rewriter.attention.recognise import recognise
from rewriter.core.errors import ModelError
from rewriter.core.site import State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from tests.attention import exported

HEADS, DIM, WIDTH = 4, 6, 24
FUNCTIONS = """
<domain: "blocks", opset_import: ["": {opset}]>
split <shape> (x, w) => (y) {{
  target = Constant <value_ints: ints = @shape> ()
  product = MatMul (x, w)
  parts = Reshape (product, target)
  y = Transpose <perm = [0, 2, 1, 3]> (parts)
}}
<domain: "blocks", opset_import: ["": {opset}]>
normalise <axis> (scores) => (p) {{
  p = Softmax <axis: int = @axis> (scores)
}}
<domain: "blocks", opset_import: ["": {opset}, "blocks": 1]>
attend <shape, merged, scale, axis> (x, wq, wk, wv, wo) => (y) {{
  q = blocks.split <shape: ints = @shape> (x, wq)
  k = blocks.split <shape: ints = @shape> (x, wk)
  v = blocks.split <shape: ints = @shape> (x, wv)
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  factor = Constant <value_float: float = @scale> ()
  product = MatMul (q, kt)
  scores = Mul (product, factor)
  p = blocks.normalise <axis: int = @axis> (scores)
  mixed = MatMul (p, v)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  target = Constant <value_ints: ints = @merged> ()
  flat = Reshape (back, target)
  y = MatMul (flat, wo)
}}
"""
MODEL = """<ir_version: 9, opset_import: ["": 17, "blocks": 1]>
main (float[batch, seq, 24] x) => (float[batch, seq, 24] y) {{
  h = blocks.attend <shape = [0, 0, 4, 6], merged = [0, 0, 24], scale = {scale}, axis = -1> (x, w0, w1, w2, w3)
  a = Relu (h)
  y = blocks.attend <shape = [0, 0, 4, 6], merged = [0, 0, 24], scale = 0.25, axis = -1> (a, w4, w5, w6, w7)
}}"""


def model(opset: int = 17, scale: float = 0.5) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(MODEL.format(scale=scale) + FUNCTIONS.format(opset=opset))
    random = np.random.default_rng(0)
    for i in range(8):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) * WIDTH**-0.5
        proto.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    return proto


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def agrees(path: Path, graph: OnnxGraph) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)}
    expected = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    actual = [tensor.numpy() for tensor in Interpreter(graph).run(feeds).values()]
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)


def test_attention_in_nested_functions(tmp_path: Path) -> None:
    path = saved(model(), tmp_path)
    graph = load(path)
    agrees(path, graph)
    found = recognise(graph)
    assert [(site.state, site.heads, site.scale) for site in found.attention] == [
        (State.LOWERABLE, HEADS, pytest.approx(0.5)),
        (State.LOWERABLE, HEADS, pytest.approx(0.25)),
    ]
    assert [site.value.weight_name for site in found.attention] == ["w2", "w6"]
    assert not found.unrecognised


def test_functions_of_another_opset_that_means_the_same(tmp_path: Path) -> None:
    path = saved(model(opset=16), tmp_path)
    graph = load(path)
    agrees(path, graph)
    assert [site.state for site in recognise(graph).attention] == [State.LOWERABLE] * 2


def test_functions_of_another_opset_that_means_something_else(tmp_path: Path) -> None:
    """Softmax of opset 11 flattens what comes after its axis."""
    with pytest.raises(ModelError, match=r"blocks::normalise.*opset 11.*Softmax"):
        load(saved(model(opset=11), tmp_path))


def test_a_function_inside_a_branch(tmp_path: Path) -> None:
    proto = model()
    calls = list(proto.graph.node)
    del proto.graph.node[:]
    then = helper.make_graph([calls[0]], "then", [], [helper.make_tensor_value_info("h", TensorProto.FLOAT, None)])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])], "other", [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )  # fmt: skip
    branches = helper.make_node("If", ["flag"], ["picked"], name="either", then_branch=then, else_branch=other)
    calls[1].input[0] = "picked"
    calls[2].input[0] = "a"
    calls[1].output[0] = "a"
    proto.graph.node.extend([branches, *calls[1:]])
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    found = recognise(load(saved(proto, tmp_path)))
    assert sorted((site.id, site.state) for site in found.attention) == [
        ("either/then_branch/layers.0.attention", State.MAPPED),
        ("layers.0.attention", State.LOWERABLE),
    ]


def test_a_function_for_every_operator(tmp_path: Path) -> None:
    """As torch's exporters write them when they keep the functions of their library."""
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    graph = exported.export(exported.Block(), [x], ["x"], opset=18)
    proto = onnx.load(graph.save(tmp_path / "plain.onnx"))
    _wrap(proto, {"MatMul", "Softmax", "Transpose", "Reshape", "Mul"})
    path = saved(proto, tmp_path)
    wrapped = load(path)
    (site,), (plain,) = recognise(wrapped).attention, recognise(graph).attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.scale, site.query.weight_name) == (plain.heads, plain.scale, plain.query.weight_name)


def _wrap(proto: onnx.ModelProto, kinds: set[str]) -> None:
    """Put every node of these kinds into a function of its own, attributes handed down by reference."""
    for number, node in enumerate(proto.graph.node):
        if node.op_type not in kinds:
            continue
        inner = helper.make_node(node.op_type, [f"in{i}" for i in range(len(node.input))], ["out"])
        for attribute in node.attribute:
            inner.attribute.add(name=attribute.name, type=attribute.type, ref_attr_name=attribute.name)
        name = f"aten_{node.op_type.lower()}_{number}"
        function = helper.make_function(
            "pkg.torch", name, list(inner.input), ["out"], [inner], [helper.make_opsetid("", 18)],
            [attribute.name for attribute in node.attribute],
        )  # fmt: skip
        proto.functions.append(function)
        node.op_type, node.domain = name, "pkg.torch"
    proto.opset_import.append(helper.make_opsetid("pkg.torch", 1))
