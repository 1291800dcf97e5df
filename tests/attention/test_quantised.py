"""Attention behind what onnxruntime.quantization really writes: found, mapped, and left alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import Tensor, nn

from rewriter.attention.dequantise import QUANTISED, dequantised
from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite, Recognition, State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from tests.attention import exported
from tests.attention.test_fused import HEADS, MICROSOFT, WIDTH, Made

Make = Callable[[Path, Path], None]


class Layer(nn.Module):
    """A block with a feed-forward and norms: what quantisers meet in an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = exported.Block()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.attention(x))
        return self.second(x + self.down(torch.relu(self.up(x))))


@cache
def layer() -> OnnxGraph:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    return exported.export(Layer(), [x], ["x"])


class Reader(quantization.CalibrationDataReader):
    """Three random batches."""

    def __init__(self) -> None:
        self.left = 3

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self.left:
            return None
        self.left -= 1
        return {"x": np.random.default_rng(self.left).standard_normal((2, 7, 24)).astype(np.float32)}


def dynamic(per_channel: bool) -> Make:
    def make(source: Path, target: Path) -> None:
        kind = quantization.QuantType.QInt8 if per_channel else quantization.QuantType.QUInt8
        quantization.quantize_dynamic(source, target, per_channel=per_channel, weight_type=kind)

    return make


def static(form: str, per_channel: bool = False) -> Make:
    def make(source: Path, target: Path) -> None:
        quantization.quantize_static(
            source, target, Reader(), quant_format=quantization.QuantFormat[form], per_channel=per_channel
        )

    return make


def few_bits(form: str, symmetric: bool = False) -> Make:
    def make(source: Path, target: Path) -> None:
        config = DefaultWeightOnlyQuantConfig(
            block_size=16, is_symmetric=symmetric, quant_format=quantization.QuantFormat[form]
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        onnx.save(quantizer.model.model, target)

    return make


def optimised(first: Make) -> Make:
    """What ONNX Runtime's own optimiser makes of a quantised graph."""

    def make(source: Path, target: Path) -> None:
        between = target.with_name("between.onnx")
        first(source, between)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(str(between), options, providers=["CPUExecutionProvider"])

    return make


WAYS: dict[str, Make] = {
    "dynamic": dynamic(False),
    "dynamic per channel": dynamic(True),
    "static": static("QDQ"),
    "static per channel": static("QDQ", True),
    "static operators": static("QOperator"),
    "four bits": few_bits("QOperator"),
    "four bits without zero points": few_bits("QOperator", True),
    "four bits in blocks": few_bits("QDQ"),
    "dynamic, optimised": optimised(dynamic(False)),
    "static, optimised": optimised(static("QDQ")),
}


def quantised(way: str, folder: Path) -> OnnxGraph:
    logging.disable(logging.CRITICAL)
    try:
        WAYS[way](layer().save(folder / "model.onnx"), folder / "quantised.onnx")
    finally:
        logging.disable(logging.NOTSET)
    return load(folder / "quantised.onnx")


def only(found: Recognition) -> AttentionSite:
    (site,) = found.attention
    return site


@pytest.mark.parametrize("way", WAYS)
def test_blocks_are_mapped_with_what_the_weights_stand_for(way: str, tmp_path: Path) -> None:
    graph = quantised(way, tmp_path)
    assert any(node.op_type in QUANTISED for node in graph.topological())
    found, original = recognise(graph), recognise(layer())
    site, true = only(found), only(original)
    assert (site.state, site.heads, site.qk_dim) == (State.MAPPED, 4, 6)
    assert [problem.code for problem in site.problems] == ["quantised"]
    step = 0.14 if "four" in way else 0.012
    for mine, other in zip((site.query, site.key, site.value), (true.query, true.key, true.value), strict=True):
        assert mine.weight_CGD is not None
        assert other.weight_CGD is not None
        np.testing.assert_allclose(mine.weight_CGD, other.weight_CGD, atol=step * np.abs(other.weight_CGD).max())
    assert site.scale == pytest.approx(true.scale, rel=0.02)
    (feed_forward,) = found.feed_forward
    assert feed_forward.state is State.MAPPED
    assert not found.unrecognised


@pytest.mark.parametrize("way", WAYS)
def test_the_copy_in_floats_is_what_was_quantised(way: str, tmp_path: Path) -> None:
    """Without rounding of activations the copy differs from the model in floats by its rounded weights alone."""
    copy = dequantised(quantised(way, tmp_path))
    left = {node.op_type for node in copy.topological()} & QUANTISED
    assert left <= {"DequantizeLinear"}
    feeds = {"x": np.random.default_rng(9).standard_normal((3, 5, 24)).astype(np.float32)}
    (actual,), (expected,) = (list(Interpreter(graph).run(feeds).values()) for graph in (copy, layer()))
    assert copy.outputs == load(tmp_path / "quantised.onnx").outputs
    assert float((actual - expected).abs().max()) < (0.9 if "four" in way else 0.15)


def test_quantised_attention_is_mapped(tmp_path: Path) -> None:
    """QAttention, as the optimiser and quantize_dynamic make it of Attention."""
    made = Made()
    weight = np.random.default_rng(3).integers(0, 255, (WIDTH, 3 * WIDTH)).astype(np.uint8)
    made.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]))
    constants = [made.constant(array) for array in (weight, np.zeros(3 * WIDTH, np.float32), np.float32(0.01))]
    zero = made.constant(np.uint8(128))
    inputs = ["xq", *constants[:2], "xs", constants[2], "", "xz", zero]
    context = made.op("QAttention", *inputs, domain=MICROSOFT, num_heads=HEADS, unidirectional=1)
    site = only(recognise(made.graph(tmp_path, context)))
    assert (site.state, site.causal) == (State.MAPPED, True)
    assert site.query.weight_CGD is not None
    expected = (weight.astype(np.float32)[:, :WIDTH] - 128) * np.float32(0.01)
    np.testing.assert_allclose(site.query.weight_CGD.reshape(WIDTH, WIDTH), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["MatMulBnb4", "DecoderMaskedMultiHeadAttention", "LongformerAttention"])
def test_operators_that_nobody_here_computes_are_named(kind: str, tmp_path: Path) -> None:
    made = Made()
    if kind == "MatMulBnb4":
        levels = made.constant(np.zeros(WIDTH * WIDTH // 2, np.uint8))
        scales = made.constant(np.ones(WIDTH * WIDTH // 16, np.float32))
        context = made.op(kind, "x", levels, scales, domain=MICROSOFT, K=WIDTH, N=WIDTH, block_size=16, quant_type=1)
    else:
        context = made.op(kind, made.linear(), made.linear(), made.linear(), domain=MICROSOFT, num_heads=HEADS)
    found = recognise(made.graph(tmp_path, context))
    assert not found.sites
    assert [entry.refusal.code for entry in found.unrecognised] == ["unsupported-operator"]
    assert kind in found.unrecognised[0].refusal.why


def test_blocks_of_four_bits_at_opset_21(tmp_path: Path) -> None:
    """DequantizeLinear of an int4 weight with a scale for every block of rows."""
    made, block = Made(), 8
    levels = np.random.default_rng(4).integers(-8, 8, (WIDTH, 3 * WIDTH))
    made.weights.append(helper.make_tensor("levels", TensorProto.INT4, levels.shape, levels.reshape(-1)))
    scales = np.random.default_rng(5).uniform(0.01, 0.05, (WIDTH // block, 3 * WIDTH)).astype(np.float32)
    weight = made.op("DequantizeLinear", "levels", made.constant(scales), axis=0, block_size=block)
    packed = made.op("Reshape", made.op("MatMul", "x", weight), made.constant(np.array([0, 0, HEADS, 3, 6])))
    context = made.op("MultiHeadAttention", packed, domain=MICROSOFT, num_heads=HEADS)
    site = only(recognise(made.graph(tmp_path, context, opset=21)))
    assert (site.state, site.heads) == (State.MAPPED, HEADS)
    assert site.query.weight_CGD is not None
    expected = (levels * np.repeat(scales, block, 0)).reshape(WIDTH, HEADS, 3, 6)[:, :, 0]
    np.testing.assert_allclose(site.query.weight_CGD, expected, rtol=1e-6)
    assert numpy_helper.to_array(made.weights[0]).shape == levels.shape
