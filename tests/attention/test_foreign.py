"""What other tools make of a model: quantised products, control flow, half precision, old opsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from tests.attention import exported


def saved(graph: OnnxGraph, folder: Path) -> Path:
    return graph.save(folder / "float.onnx")


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_quantised_products_are_mapped_not_rewritten(tmp_path: Path, how: str) -> None:
    from onnxruntime import quantization

    source, target = saved(exported.block(), tmp_path), tmp_path / "quantised.onnx"
    if how == "dynamic":
        quantization.quantize_dynamic(source, target)
    else:

        class Reader(quantization.CalibrationDataReader):
            left = 3

            def get_next(self) -> dict[str, np.ndarray] | None:
                self.left -= 1
                random = np.random.default_rng(self.left + 1)
                return {"x": random.standard_normal((2, 7, 24)).astype(np.float32)} if self.left >= 0 else None

        quantization.quantize_static(source, target, Reader(), quant_format=quantization.QuantFormat.QDQ)
    found = recognise(load(target))
    (site,) = found.attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["quantised"]
    assert (site.heads, site.qk_dim) == (4, 6)


def test_attention_in_a_branch_is_mapped(tmp_path: Path) -> None:
    inner = onnx.load(saved(exported.block(), tmp_path)).graph
    taken = helper.make_graph(
        [*inner.node, helper.make_node("Identity", ["output"], ["taken"])], "then", [],
        [helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)], list(inner.initializer),
    )  # fmt: skip
    left = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["left"])], "else", [],
        [helper.make_tensor_value_info("left", TensorProto.FLOAT, None)],
    )  # fmt: skip
    node = helper.make_node("If", ["flag"], ["result"], then_branch=taken, else_branch=left)
    inputs = [inner.input[0], helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph([node], "branches", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(model, tmp_path / "branches.onnx")
    found = recognise(load(tmp_path / "branches.onnx"))
    (site,) = found.attention
    assert (site.id, site.state) == ("result/then_branch/layers.0.attention", State.MAPPED)
    assert [problem.code for problem in site.problems] == ["control-flow"]


def test_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    model = onnx.load(saved(exported.block(), tmp_path))
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "half.onnx")
    graph = load(tmp_path / "half.onnx")
    (site,) = recognise(graph).attention
    assert site.state is State.LOWERABLE, site.problems
    assert site.query.weight_CGD is not None
    assert site.query.weight_CGD.dtype == np.float16
    lowered = lower(graph, [site])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float16)}
    (expected,), (actual,) = (list(Interpreter(one).run(feeds).values()) for one in (graph, lowered))
    assert actual.dtype == torch.float16
    assert float((actual - expected).abs().max()) < 2e-2


@pytest.mark.parametrize("opset", [10, 11, 12, 14, 16])
def test_old_opsets(opset: int) -> None:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    graph = exported.export(exported.Block(), [x], ["x"], opset=opset)
    (site,) = recognise(graph).attention
    assert site.state is State.LOWERABLE, site.problems
