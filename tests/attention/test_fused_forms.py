"""Every form of the attention operators of ONNX Runtime and the standard: states, and numbers in ONNX Runtime.

Each graph is raised, lowered anew, written out in standard operators and compared with the original, both in ONNX
Runtime; and the original's own outputs there with those of the interpreter, so that neither can be wrong alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite, State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.standard import to_standard
from tests.attention.test_fused import DIM, HEADS, MICROSOFT, WIDTH, Made

BATCH, TOKENS, PAST = 2, 5, 3
TOTAL = PAST + TOKENS
FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


def in_runtime(graph: OnnxGraph, feeds: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph.save(path)), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def proved(graph: OnnxGraph, feeds: dict[str, np.ndarray], folder: Path, runs: bool = True) -> AttentionSite:
    """The lowerable site of a graph whose lowering gives the same numbers in ONNX Runtime."""
    (site,) = recognise(graph).attention
    assert site.state is State.LOWERABLE, site.problems
    lowered = lower(graph, [site])
    assert not any(node.op_type.endswith("Attention") and node.domain != "rewriter" for node in lowered.model.graph)
    fed = {spec.name: feeds[spec.name] for spec in graph.inputs}
    actual = in_runtime(to_standard(lowered), fed, folder / "lowered.onnx")
    mine = [tensor.numpy() for tensor in Interpreter(graph).run(fed).values()]
    expected = in_runtime(graph, fed, folder / "original.onnx") if runs else mine
    for other, one, two in zip(expected, mine, actual, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(two, other, atol=2e-5, rtol=1e-4)
    return site


def caches(made: Made, heads: int, packed: bool = False) -> tuple[list[str], tuple[str, ...]]:
    """Names of past inputs and present outputs."""
    if packed:
        past = [made.input("past", FLOAT, 2, "batch", heads, "past_seq", DIM)]
        return past, (made.output("present", 2, "batch", heads, "total", DIM),)
    past = [made.input(f"past_{n}", FLOAT, "batch", heads, "past_seq", DIM) for n in "kv"]
    return past, tuple(made.output(f"present_{n}", "batch", heads, "total", DIM) for n in "kv")


def cache_feeds(heads: int) -> dict[str, np.ndarray]:
    return {
        "past": random(2, BATCH, heads, PAST, DIM),
        **{f"past_{n}": random(BATCH, heads, PAST, DIM, seed=i) for i, n in enumerate("kv")},
    }


MASKS: dict[str, tuple[tuple[Any, ...], np.ndarray]] = {
    "lengths": (("batch",), np.array([3, 5], np.int32)),
    "ends and starts": (("2*batch",), np.array([4, 5, 1, 0], np.int32)),
    "raw": (("batch", "total"), np.array([[1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]], np.int32)),
    "per query": (("batch", "seq", "total"), (random(BATCH, TOKENS, TOTAL) > -0.8).astype(np.int32)),
    "square": (("batch", 1, 64, 64), np.tril(np.ones((BATCH, 1, 64, 64), np.int32))),
}


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("mask", ["", *MASKS])
def test_packed_weights_with_every_mask(mask: str, past: bool, tmp_path: Path) -> None:
    made, feeds = Made(), {"x": random(BATCH, TOKENS, WIDTH), **cache_feeds(HEADS)}
    names, outputs = caches(made, HEADS, packed=True) if past else ([""], ())
    if mask:
        shape, array = MASKS[mask]
        keys = TOTAL if past else TOKENS
        feeds["mask"] = (
            array if mask in ("lengths", "square", "ends and starts") else np.ascontiguousarray(array[..., :keys])
        )
        shape = tuple("seq" if axis == "total" and not past else axis for axis in shape)
        made.input("mask", INT32, *shape)
    weights = (made.weight(WIDTH, 3 * WIDTH), made.weight(3 * WIDTH))
    context = made.op(
        "Attention", "x", *weights, "mask" if mask else "", *names, outputs=("c", *outputs), domain=MICROSOFT,
        num_heads=HEADS, unidirectional=int(mask == "raw"), scale=0.3, mask_filter_value=-5000.0,
    )  # fmt: skip
    # the processor's kernel has no square masks
    site = proved(made.graph(tmp_path, context), feeds, tmp_path, runs=mask != "square")
    assert site.scale == pytest.approx(0.3)
    assert site.cached == past


def test_packed_weights_with_values_of_another_size_and_a_bias(tmp_path: Path) -> None:
    made = Made()
    wide = HEADS * 8
    added = made.input("added", FLOAT, 1, HEADS, "seq", "seq")
    weights = (made.weight(WIDTH, 2 * WIDTH + wide), made.weight(2 * WIDTH + wide))
    context = made.op(
        "Attention", "x", *weights, "", "", added, domain=MICROSOFT, num_heads=HEADS,
        qkv_hidden_sizes=[WIDTH, WIDTH, wide],
    )  # fmt: skip
    context = made.op("MatMul", context, made.weight(wide, WIDTH))
    made.op("Relu", context, outputs=("result",))
    graph = made.finished(tmp_path)
    feeds = {"x": random(BATCH, TOKENS, WIDTH), "added": random(1, HEADS, TOKENS, TOKENS)}
    site = proved(graph, feeds, tmp_path)
    assert (site.qk_dim, site.v_dim) == (DIM, 8)


@pytest.mark.parametrize("form", ["lengths", "per query", "raw", "added to a mask", "causal with a mask", "cross"])
def test_multi_head_attention(form: str, tmp_path: Path) -> None:
    made, feeds = Made(), {"x": random(BATCH, TOKENS, WIDTH)}
    inputs = [made.linear(), made.linear(), made.linear(), "", "", ""]
    mask = {"added to a mask": "per query", "causal with a mask": "raw"}.get(form, form)
    if mask in MASKS:
        shape, array = MASKS[mask]
        feeds["mask"] = array if mask == "lengths" else np.ascontiguousarray(array[..., :TOKENS])
        inputs[4] = made.input("mask", INT32, *("seq" if axis == "total" else axis for axis in shape))
    if form == "added to a mask":
        inputs[5] = made.input("added", FLOAT, "batch", HEADS, "seq", "seq")
        feeds["added"] = random(BATCH, HEADS, TOKENS, TOKENS)
    if form == "cross":
        for i, name in ((1, "keys"), (2, "values")):
            inputs[i] = made.input(name, FLOAT, "batch", HEADS, "others", DIM)
            feeds[name] = random(BATCH, HEADS, 7, DIM, seed=i)
    attributes = {"unidirectional": 1} if form.startswith("causal") else {}
    context = made.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=HEADS, **attributes)
    site = proved(made.graph(tmp_path, context), feeds, tmp_path)
    assert site.mapped == (form != "cross")
    assert site.cross == (form == "cross")


@pytest.mark.parametrize("form", ["keys with values", "computed operands", "bias on computed operands"])
def test_multi_head_attention_of_other_operands(form: str, tmp_path: Path) -> None:
    made, feeds = Made(), {"x": random(BATCH, TOKENS, WIDTH)}
    inputs = [made.linear(), made.linear(), made.linear(), ""]
    if form == "keys with values":
        packed = made.linear(columns=2 * WIDTH)
        inputs[1:3] = [made.op("Reshape", packed, made.constant(np.array([0, 0, HEADS, 2, DIM]))), ""]
    else:
        inputs[0] = made.op("Tanh", inputs[0])
        inputs[3] = made.weight(3 * WIDTH) if form.startswith("bias") else ""
    context = made.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=HEADS)
    # the processor's kernel takes no packed keys and values
    site = proved(made.graph(tmp_path, context), feeds, tmp_path, runs=form != "keys with values")
    assert site.mapped == (form == "keys with values")
    assert site.key.mapped


GROUPED = [
    "plain",
    "packed",
    "rotary",
    "interleaved",
    "window",
    "capped",
    "added",
    "positions",
    "partial rotary",
    "sink",
    "smooth",
]


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("form", GROUPED)
def test_grouped_queries(form: str, past: bool, tmp_path: Path) -> None:
    made, attributes = Made(), dict[str, Any]()
    # with a past ONNX Runtime takes one token of several rows, or several tokens of one row
    rows, tokens = (BATCH, 1) if past and form != "rotary" else (1, TOKENS) if past else (BATCH, TOKENS)
    total = tokens + (PAST if past else 0)
    made.input("mask", INT64, "batch", "total" if past else "seq")
    last = made.op("Sub", made.op("ReduceSum", "mask", made.constant([1]), keepdims=0), made.constant([1]))
    last = made.op("Cast", last, to=INT32)
    length = made.op("Cast", made.op("Gather", made.op("Shape", "mask"), made.constant(np.array(1))), to=INT32)
    groups = 2
    head = 32 if form == "partial rotary" else 16 if form in ("rotary", "interleaved", "positions") else 8
    operands = [made.linear(columns=n * head) for n in (HEADS, groups, groups)]
    if form == "packed":
        operands = [made.linear(columns=(HEADS + 2 * groups) * head), "", ""]
    names = [made.input(f"past_{n}", FLOAT, "batch", groups, "past_seq", head) for n in "kv"] if past else ["", ""]
    outputs = tuple(made.output(f"present_{n}", "batch", groups, "all", head) for n in "kv")
    extra = ["", "", "", ""]
    if head > 8:
        half = 8
        angles = np.arange(64)[:, None] * 10.0 ** (-np.arange(half) / half)
        extra[:2] = [made.constant(turn(angles).astype(np.float32)) for turn in (np.cos, np.sin)]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(form == "interleaved")}
    feeds = {f"past_{n}": random(rows, groups, PAST, head, seed=i) for i, n in enumerate("kv")}
    feeds |= {"x": random(rows, tokens, WIDTH), "mask": np.ones((rows, total), np.int64)}
    feeds["mask"][0, -2:] = int(rows == 1)
    if form == "positions":
        extra[2] = made.input("places", INT64, "batch", "seq")
        feeds["places"] = np.arange(tokens)[None] + np.full((rows, 1), 2)
    if form == "added":
        extra[3] = made.input("added", FLOAT, "batch", HEADS, "seq", "total" if past else "seq")
        feeds["added"] = random(rows, HEADS, tokens, total)
    if form == "sink":
        extra.append(made.constant(random(HEADS)))
    attributes |= {"smooth": {"smooth_softmax": 1}}.get(form, {})
    attributes |= {"window": {"local_window_size": 3}, "capped": {"softcap": 5.0}}.get(form, {})
    context = made.op(
        "GroupQueryAttention", *operands, *names, last, length, *extra, outputs=("c", *outputs), domain=MICROSOFT,
        num_heads=HEADS, kv_num_heads=groups, scale=0.21, **attributes,
    )  # fmt: skip
    made.op("MatMul", context, made.weight(HEADS * head, WIDTH), outputs=("result",))
    site = proved(made.finished(tmp_path), feeds, tmp_path)
    assert (site.kv_heads, site.key.head_of, site.cached) == (groups, (0, 0, 1, 1), True)
    assert (site.position == "rotary") == (head > 8)
    assert (site.sink_H is not None) == (form in ("sink", "smooth"))
    assert site.causal or form in ("added", "window")
