"""Graphs that already hold attention as one operator, of the standard or of com.microsoft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite, State
from rewriter.graph.onnx import OnnxGraph, load

HEADS, DIM = 4, 6
WIDTH = HEADS * DIM
MICROSOFT = "com.microsoft"


class Made:
    """A graph under construction: x (B, S, C) in, result out."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
        self.outputs = [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
        self.random = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        array = self.random.standard_normal(shape).astype(np.float32) * shape[0] ** -0.5
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def constant(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def input(self, name: str, kind: int, *shape: str | int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, *shape: str | int) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def op(self, kind: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: Any) -> str:
        outputs = outputs or (f"v{len(self.nodes)}",)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str = "x", columns: int = WIDTH) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(WIDTH, columns)), self.weight(columns))

    def graph(self, folder: Path, context: str, opset: int = 17) -> OnnxGraph:
        self.op("MatMul", context, self.weight(WIDTH, WIDTH), outputs=("result",))
        return self.finished(folder, opset)

    def finished(self, folder: Path, opset: int = 17) -> OnnxGraph:
        graph = helper.make_graph(self.nodes, "fused", self.inputs, self.outputs, self.weights)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        path = folder / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
        return load(path)


def only(graph: OnnxGraph) -> AttentionSite:
    (site,) = recognise(graph).attention
    return site


def codes(site: AttentionSite) -> list[str]:
    return [problem.code for problem in site.problems]


@pytest.mark.parametrize("masked", [False, True])
def test_packed_weights(tmp_path: Path, masked: bool) -> None:
    made = Made()
    mask = made.input("mask", TensorProto.INT32, "batch", "seq") if masked else ""
    weights = (made.weight(WIDTH, 3 * WIDTH), made.weight(3 * WIDTH))
    context = made.op("Attention", "x", *weights, mask, domain=MICROSOFT, num_heads=HEADS, unidirectional=int(masked))
    site = only(made.graph(tmp_path, context))
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.qk_dim, site.v_dim, site.causal) == (HEADS, DIM, DIM, masked)
    assert site.key.bias_GD is not None


@pytest.mark.parametrize("form", ["plain", "bias", "padding", "added", "causal"])
def test_multi_head_attention(tmp_path: Path, form: str) -> None:
    made = Made()
    inputs = [made.linear(), made.linear(), made.linear(), "", "", ""]
    if form == "bias":
        inputs[3] = made.weight(3 * WIDTH)
    if form == "padding":
        inputs[4] = made.input("mask", TensorProto.INT32, "batch", "seq")
    if form == "added":
        inputs[5] = made.input("extra", TensorProto.FLOAT, "batch", HEADS, "seq", "seq")
    attributes = {"unidirectional": 1} if form == "causal" else {}
    context = made.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=HEADS, **attributes)
    site = only(made.graph(tmp_path, context))
    assert site.state is State.LOWERABLE, site.problems
    assert site.causal == (form == "causal")
    assert site.scale == pytest.approx(DIM**-0.5)


def test_multi_head_attention_of_packed_operands(tmp_path: Path) -> None:
    made = Made()
    packed = made.linear(columns=3 * WIDTH)
    shaped = made.op("Reshape", packed, made.constant(np.array([0, 0, HEADS, 3, DIM])))
    context = made.op("MultiHeadAttention", shaped, domain=MICROSOFT, num_heads=HEADS)
    site = only(made.graph(tmp_path, context))
    assert site.state is State.LOWERABLE, site.problems
    assert site.query.heads == site.key.heads == HEADS


def test_multi_head_attention_with_its_cache(tmp_path: Path) -> None:
    made = Made()
    past = [made.input(f"past_{n}", TensorProto.FLOAT, "batch", HEADS, "past", DIM) for n in "kv"]
    present = tuple(made.output(f"present_{n}", "batch", HEADS, "total", DIM) for n in "kv")
    operands = [made.linear(), made.linear(), made.linear()]
    context = made.op(
        "MultiHeadAttention", *operands, "", "", "", *past, outputs=("c", *present), domain=MICROSOFT, num_heads=HEADS
    )
    site = only(made.graph(tmp_path, context))
    assert site.state is State.LOWERABLE, site.problems
    assert (site.cached, site.key.past, site.value.present) == (True, "past_k", "present_v")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_standard_attention_is_causal_and_masked(tmp_path: Path, masked: bool, cached: bool) -> None:
    made = Made()
    keys = "total" if cached else "seq"
    mask = made.input("mask", TensorProto.BOOL, "batch", 1, "seq", keys) if masked else ""
    past = [made.input(f"past_{n}", TensorProto.FLOAT, "batch", 2, "past", DIM) for n in "kv"] if cached else []
    present = tuple(made.output(f"present_{n}", "batch", 2, "total", DIM) for n in "kv") if cached else ()
    operands = [made.linear(), made.linear(columns=2 * DIM), made.linear(columns=2 * DIM)]
    context = made.op(
        "Attention", *operands, mask, *past, outputs=("c", *present), q_num_heads=HEADS, kv_num_heads=2, is_causal=1
    )
    site = only(made.graph(tmp_path, context, opset=23))
    assert site.state is State.LOWERABLE, site.problems
    assert (site.kv_heads, site.key.head_of, site.cached) == (2, (0, 0, 1, 1), cached)


@pytest.mark.parametrize("packed", [False, True])
def test_grouped_queries_that_make_a_cache(tmp_path: Path, packed: bool) -> None:
    made = Made()
    lengths = made.op("Expand", made.constant(np.array([0], np.int32)), made.constant(np.array([1])))
    shape = made.op("Shape", "x")
    batch, total = (made.op("Slice", shape, made.constant([i]), made.constant([i + 1])) for i in (0, 1))
    last = made.op("Sub", made.op("Cast", total, to=6), made.constant(np.array([1], np.int32)))
    lengths = made.op("Expand", last, batch)
    scalar = made.op("Squeeze", made.op("Cast", total, to=6))
    operands = [made.linear(), made.linear(columns=2 * DIM), made.linear(columns=2 * DIM)]
    if packed:
        operands = [made.op("Concat", *operands, axis=-1), "", ""]
        operands[0] = made.linear(columns=WIDTH + 4 * DIM)
    present = tuple(made.output(f"present_{n}", "batch", 2, "total", DIM) for n in "kv")
    context = made.op(
        "GroupQueryAttention", *operands, "", "", lengths, scalar, outputs=("c", *present), domain=MICROSOFT,
        num_heads=HEADS, kv_num_heads=2,
    )  # fmt: skip
    site = only(made.graph(tmp_path, context))
    assert site.state is State.LOWERABLE, site.problems
    assert site.cached
    assert (site.heads, site.kv_heads, site.key.head_of, site.causal) == (HEADS, 2, (0, 0, 1, 1), True)


@pytest.mark.parametrize("turned", [False, True])
def test_products_fused_with_scale_and_transposes(tmp_path: Path, turned: bool) -> None:
    made = Made()
    shape, order = made.constant(np.array([0, 0, HEADS, DIM])), (0, 2, 1, 3)
    query, key, value = (made.op("Reshape", made.linear(), shape) for _ in range(3))
    query, value = (made.op("Transpose", one, perm=order) for one in (query, value))
    key = made.op("Transpose", key, perm=(0, 2, 3, 1) if turned else order)
    scores = made.op("FusedMatMul", query, key, domain=MICROSOFT, alpha=0.3, transB=int(not turned))
    mixed = made.op("FusedMatMul", made.op("Softmax", scores, axis=-1), value, domain=MICROSOFT)
    merged = made.op("Reshape", made.op("Transpose", mixed, perm=order), made.constant(np.array([0, 0, WIDTH])))
    made.op(
        "FusedMatMul", merged, made.weight(WIDTH, WIDTH), outputs=("result",), domain=MICROSOFT, alpha=2.0, transB=1
    )
    site = only(made.finished(tmp_path))
    assert site.state is State.LOWERABLE, site.problems
    assert site.scale == pytest.approx(0.3)
    assert site.output is not None
    weight = numpy_helper.to_array(made.weights[-1])
    np.testing.assert_allclose(site.output.weight_HDC.reshape(WIDTH, WIDTH), 2 * weight.T, rtol=1e-6)
