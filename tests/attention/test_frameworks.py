"""Graphs as converters of TensorFlow, Keras, JAX and Paddle models write them are understood like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import Recognition, State
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.standard import to_standard
from tests.attention.builder import Builder
from tests.attention.frameworks import ATTENTIONS, DIM, HEADS, WIDTH, feed_forward, layer_norm

UNMASKED = ("folded", "paddle", "image", "multiplied")


def block(name: str, folder: Path, tanh: bool = True) -> OnnxGraph:
    """Embedded tokens, attention, feed-forward, and a norm after each."""
    attention, opset = ATTENTIONS[name]
    b = Builder(opset)
    ids = b.input("input_ids", ["unk__1", "unk__2"], TensorProto.INT64)
    mask = "" if name in UNMASKED else b.input("input_mask", ["unk__1", "unk__2"], TensorProto.INT64)
    x = b.op("Gather", b.weight(61, WIDTH), ids, axis=0)
    x = layer_norm(b, b.op("Add", attention(b, x, mask), x))
    x = layer_norm(b, b.op("Add", x, feed_forward(b, x, tanh)))
    return b.graph(x, ["unk__1", "unk__2", WIDTH], folder)


def recognised(name: str, folder: Path) -> tuple[OnnxGraph, Recognition]:
    graph = block(name, folder)
    return graph, recognise(graph)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_framework_is_understood(name: str, tmp_path: Path) -> None:
    graph, found = recognised(name, tmp_path)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert not found.unrecognised
    assert (site.heads, site.kv_heads, site.qk_dim, site.v_dim) == (HEADS, HEADS, DIM, DIM)
    assert site.scale == pytest.approx(DIM**-0.5, rel=1e-5)
    assert site.mask == ("causal" if name == "multiplied" else "none" if name in UNMASKED else "padding")
    (feed,) = found.feed_forward
    assert feed.state is State.LOWERABLE, feed.problems
    assert feed.activation == "gelu_tanh"
    lowered = to_standard(lower(graph, [site, feed]))
    ids = np.random.default_rng(0).integers(3, 60, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[0, 5:] = 0
    feeds = {"input_ids": ids, "input_mask": mask}
    expected, actual = (in_runtime(one, feeds, tmp_path) for one in (graph, lowered))
    assert np.abs(actual - expected).max() < 1e-5


def in_runtime(graph: OnnxGraph, feeds: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.save(folder / "run.onnx"), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return np.asarray(session.run(None, {name: feeds[name] for name in feeds if name in names})[0])


def test_gelu_spelled_with_erf(tmp_path: Path) -> None:
    (feed,) = recognise(block("hub", tmp_path, tanh=False)).feed_forward
    assert (feed.state, feed.activation) == (State.LOWERABLE, "gelu")
