"""Operators that only some families need, against the interpreter; and what half precision becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.operators.reductions import spelled_out
from tests.runtimes.tvm.harness import assert_same, numbers, run_graph, run_reference

MICROSOFT = "com.microsoft"
FEEDS: dict[str, np.ndarray] = {
    "x": numbers(2, 3, 8, seed=1), "y": numbers(2, 3, 8, seed=2), "image": numbers(2, 4, 6, 7, seed=3),
    "line": numbers(2, 4, 9, seed=4), "cube": numbers(1, 2, 5, 4, 6, seed=5),
    "heads": numbers(2, 4, 3, 8, seed=6), "ids": np.array([[1, 5, 2], [0, 3, 4]], np.int64),
    "i": np.array([[3, 3, 1], [2, 5, 5]], np.int64), "flag": np.array([[True, False], [False, True]]),
    "x2": numbers(3, 6, seed=9), "at": np.array([[0, -1], [-6, 5], [2, -3]], np.int64), "upd": numbers(3, 2, seed=10),
    "kept": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    "points": np.array([[1, -1], [-2, 0]], np.int64), "new": numbers(2, 8, seed=10),
    "inner": np.array([[-1], [1]], np.int64), "left": numbers(2, 5, 4, seed=7), "right": numbers(2, 3, 4, seed=8),
}  # fmt: skip
CONSTANTS: dict[str, np.ndarray] = {
    "known": np.array([[-1, 0], [0, -2]]),
    "row": numbers(8, seed=11), "gain": numbers(8, seed=12), "beta": numbers(8, seed=13),
    "kernel": numbers(6, 2, 3, 3, seed=14), "back": numbers(4, 3, 3, 3, seed=15), "back1": numbers(4, 3, 4, seed=16),
    "kernel3": numbers(3, 2, 2, 2, 3, seed=17), "kernel1": numbers(4, 4, 3, seed=18), "b3": numbers(3, seed=19),
    "four": numbers(4, seed=20), "variance": np.abs(numbers(4, seed=21)) + 0.5, "two": numbers(2, seed=22),
    "sizes": np.array([2, 4, 9, 5]), "scales": np.array([1, 1, 2, 1.5], np.float32),
    "pads": np.array([0, 1, 2, 0, 2, 0]), "pads2": np.array([2, 1]), "axis1": np.array([1]),
    "crop": np.array([0, 0, -1, 0, 1, 2]),
    "k": np.array([2]), "one": np.int64(1), "words": numbers(7, 8, seed=23), "places": numbers(5, 8, seed=24),
    "cos": numbers(9, 4, seed=25), "sin": numbers(9, 4, seed=26),
    "cos2": numbers(9, 2, seed=27), "sin2": numbers(9, 2, seed=28),
    "middle": np.float32(0.25), "last": np.array([-1]), "slope": numbers(8, seed=29),
}  # fmt: skip
Case = tuple[str, tuple[str, ...], dict[str, Any]]
ACTIVATIONS: list[Case] = [
    *((op, ("x",), {}) for op in ("Elu", "Celu", "Selu", "Softsign", "Mish", "HardSwish", "ThresholdedRelu", "Shrink",
                                  "Asinh", "LpNormalization")),
    ("Elu", ("x",), {"alpha": 0.7}), ("Celu", ("x",), {"alpha": 2.0}), ("PRelu", ("x", "slope"), {}),
    ("Mean", ("x", "y", "x"), {}), ("LpNormalization", ("x",), {"p": 1, "axis": 1}),
    ("ReduceLogSumExp", ("x", "last"), {"keepdims": 0}), ("CumSum", ("x", "one"), {"reverse": 1}),
    ("CumSum", ("i", "one"), {"reverse": 1, "exclusive": 1}), ("TopK", ("x", "k"), {}),
    ("TopK", ("i", "k"), {"largest": 0, "axis": 1}), ("EyeLike", ("i",), {"k": 1, "dtype": 1}),
]  # fmt: skip
INDICES: list[Case] = [  # some from the end
    ("GatherElements", ("x2", "at"), {"axis": 1}), ("ScatterElements", ("x2", "at", "upd"), {"axis": 1}),
    ("GatherND", ("x", "points"), {}), ("ScatterND", ("x", "points", "new"), {}),
    ("GatherND", ("x", "inner"), {"batch_dims": 1}), ("ScatterND", ("x", "known", "new"), {"reduction": "add"}),
]  # fmt: skip
IMAGES: list[Case] = [
    ("Conv", ("image", "kernel"), {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", ("line", "kernel1", "four"), {"auto_pad": "SAME_LOWER"}), ("Conv", ("cube", "kernel3", "b3"), {}),
    ("ConvTranspose", ("image", "back", "b3"), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ("ConvTranspose", ("line", "back1"), {"strides": [2]}),
    ("MaxPool", ("image",), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", ("image",), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", ("line",), {"kernel_shape": [2], "strides": [2], "count_include_pad": 1, "pads": [1, 1]}),
    ("GlobalAveragePool", ("image",), {}), ("GlobalMaxPool", ("line",), {}),
    ("GroupNormalization", ("image", "two", "two"), {"num_groups": 2}),
    ("BatchNormalization", ("image", "four", "four", "four", "variance"), {}),
    ("DepthToSpace", ("image",), {"blocksize": 2}), ("DepthToSpace", ("image",), {"blocksize": 2, "mode": "CRD"}),
    ("Resize", ("image", "", "", "sizes"), {"mode": "linear"}), ("Resize", ("image", "", "scales"), {}),
    ("Resize", ("image", "", "scales"), {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}),
    ("Pad", ("x", "pads", "middle"), {}), ("Pad", ("x", "pads"), {"mode": "edge"}),
    ("Pad", ("x", "pads2", "", "axis1"), {"mode": "reflect"}), ("Pad", ("x", "crop"), {"mode": "edge"}),
    ("Einsum", ("left", "right"), {"equation": "... i d, ... j d -> ... i j"}),
    ("Einsum", ("left", "right", "right"), {"equation": "bnd,bmd,bkd->bnk"}),
    ("Einsum", ("left",), {"equation": "bij->bji"}),
]  # fmt: skip
FUSED: list[Case] = [
    ("SkipLayerNormalization", ("x", "y", "gain", "beta", "row"), {"epsilon": 1e-5}),
    ("SkipLayerNormalization", ("x", "y", "gain", "beta"), {}), ("BiasGelu", ("x", "row"), {}),
    ("SkipSimplifiedLayerNormalization", ("x", "y", "gain"), {}), ("FastGelu", ("x", "row"), {}),
    ("FusedMatMul", ("left", "right"), {"transB": 1, "alpha": 0.5}),
    ("EmbedLayerNormalization", ("ids", "", "words", "places", "", "gain", "beta"), {}),
    ("EmbedLayerNormalization", ("ids", "ids", "words", "places", "words", "gain", "beta", "kept"), {}),
]  # fmt: skip
SUMS = ("/unread", "//unread", "/sum")
FURTHER = {"TopK": ("/places",), "EmbedLayerNormalization": ("/lengths", "/sum")} | dict.fromkeys(
    ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), SUMS
)


def graph(cases: list[Case], opset: int, domain: str = "", feeds: Mapping[str, np.ndarray] = FEEDS) -> OnnxGraph:
    nodes, outputs = [], []
    for index, (op, inputs, attributes) in enumerate(cases):
        names = [f"{op}_{index}"]
        names += [f"{op}_{index}{part}" for part in FURTHER.get(op, ())]
        nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        outputs += [name for name in names if not name.endswith("unread")]
    used = {name for node in nodes for name in node.input}
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
        if name in used
    ]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in CONSTANTS.items() if name in used]
    made = helper.make_graph(
        nodes, "operators", infos, [helper.make_empty_tensor_value_info(name) for name in outputs], weights
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9 if opset < 23 else 11)))


@pytest.mark.parametrize(("cases", "domain"), [(ACTIVATIONS, ""), (INDICES, ""), (IMAGES, ""), (FUSED, MICROSOFT)])
def test_operators_agree_with_the_interpreter(cases: list[Case], domain: str) -> None:
    model = graph(cases, 20, domain)
    assert_same(model, {spec.name: FEEDS[spec.name] for spec in model.inputs}, 3e-5)


def test_rotary_embeddings() -> None:
    turned = ("heads", "cos", "sin", "ids")
    cases: list[Case] = [
        ("RotaryEmbedding", turned, {}), ("RotaryEmbedding", turned, {"interleaved": 1}),
        ("RotaryEmbedding", ("heads", "cos2", "sin2", "ids"), {"rotary_embedding_dim": 4}),
    ]  # fmt: skip
    model = graph(cases, 23)
    assert_same(model, {spec.name: FEEDS[spec.name] for spec in model.inputs})
    flat = {"flat": numbers(2, 3, 32, seed=9), "ids": FEEDS["ids"]}
    assert_same(graph([("RotaryEmbedding", ("flat", "ids", "cos", "sin"), {})], 20, MICROSOFT, flat), flat)


@pytest.mark.parametrize("mask", ["float", "bool", "none"])
def test_standard_attention_with_a_cache(mask: str) -> None:
    feeds = {"q": numbers(2, 4, 3, 8), "k": numbers(2, 2, 3, 8, seed=1), "v": numbers(2, 2, 3, 6, seed=2)}
    feeds["mask"] = numbers(2, 1, 3, 8, seed=3) if mask == "float" else np.random.default_rng(4).random((3, 8)) < 0.7
    past = {"past_k": numbers(2, 2, 5, 8, seed=5), "past_v": numbers(2, 2, 5, 6, seed=6)}
    if mask == "none":
        del feeds["mask"]
    inputs = [*feeds, *([""] if mask == "none" else []), *past]
    node = helper.make_node("Attention", inputs, ["y", "new_k", "new_v"], is_causal=1, softcap=3.0)
    feeds |= past
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    made = helper.make_graph([node], "attention", infos, outputs)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    assert_same(OnnxGraph(ir.from_proto(proto)), feeds)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_single(dtype: Any) -> None:
    """Inputs and outputs keep their dtype, and a rounding that the graph asks for stays."""
    x, w = numbers(3, 8, seed=1).astype(dtype), numbers(8, 5, seed=2).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Cast", ["product"], ["wide"], to=1),
        helper.make_node("Mul", ["wide", "huge"], ["large"]), helper.make_node("Cast", ["large"], ["rounded"], to=kind),
        helper.make_node("Tanh", ["product"], ["y"]),
    ]  # fmt: skip
    made = helper.make_graph(
        nodes, "half", [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in ("y", "rounded")],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32(1e6), "huge")],
    )  # fmt: skip
    model = OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))
    got, wanted = run_graph(model, {"x": x}), run_reference(model, {"x": x})
    assert got["y"].dtype == got["rounded"].dtype == dtype
    step = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got["y"].astype(np.float64), wanted["y"], rtol=step, atol=step)
    assert np.isinf(got["rounded"].astype(np.float64)).any() == (dtype == np.float16)


def test_equations_are_spelled_out() -> None:
    assert spelled_out("... i d, j d -> ... i j", [4, 2], 4) == "baid,jd->baij"
    assert spelled_out("ij,jk", [2, 2], 2) == "ij,jk->ik"
    assert spelled_out("...i,...i", [2, 3], 2) == "ai,bai->ba"
