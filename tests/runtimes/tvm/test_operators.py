"""Every operator of the table against the interpreter, many nodes in one graph (compiling is what costs)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.operators import TABLE
from rewriter.runtimes.tvm.specialise import specialise
from tests.runtimes.composite_graphs import single
from tests.runtimes.tvm.harness import assert_same, numbers, run_graph

FEEDS: dict[str, np.ndarray] = {
    "x": numbers(2, 3, 8, seed=1),
    "y": numbers(2, 3, 8, seed=2),
    "row": numbers(8, seed=3),
    "table": numbers(7, 6, seed=4),
    "image": numbers(1, 4, 6, 6, seed=5),
    "i": np.array([[7, -7, 3], [-9, 9, 2]], np.int64),
    "j": np.array([[2, 2, -2], [4, -4, 5]], np.int64),
    "pick": np.array([[0, 2, 5], [6, 1, 3]], np.int64),
    "flag": np.array([[True, False, True], [False, False, True]]),
    "pairs": np.array([[[0, 1], [1, 2]]], np.int64),
}
CONSTANTS: dict[str, np.ndarray] = {
    "w": numbers(8, 5, seed=6),
    "wt": numbers(5, 8, seed=7),
    "b": numbers(5, seed=8),
    "gain": numbers(8, seed=9),
    "kernel": numbers(6, 2, 3, 3, seed=10),
    "four": numbers(4, seed=13),
    "two": np.float32(2.0), "half": np.float32(0.5), "low": np.float32(-0.3), "high": np.float32(0.4),
    "last": np.array([-1], np.int64), "first": np.array([0], np.int64), "one": np.array([1], np.int64),
    "middle": np.array([1], np.int64), "end": np.array([-10], np.int64), "step": np.array([-2], np.int64),
    "shape": np.array([0, -1], np.int64), "wide": np.array([4, 1, 3, 8]),
    "twice": np.array([1, 2, 1], np.int64),
    "sizes": np.array([3, 5], np.int64), "pads": np.array([0, 1, 0, 0, 0, 2], np.int64), "scalar": np.int64(1),
    "negative": np.array([-1, 0], np.int64), "depth": np.array([7], np.int64),
    "onoff": np.array([0.5, 2.0], np.float32),
    "updates": numbers(1, 2, 8, seed=11), "upd": numbers(2, 3, seed=12),
}  # fmt: skip
Case = tuple[str, tuple[str, ...], dict[str, Any]]
ELEMENTWISE: list[Case] = [
    *((op, ("x",), {}) for op in ("Abs", "Ceil", "Floor", "Round", "Neg", "Sin", "Cos", "Sign", "IsNaN", "Erf", "Exp",
                                  "Tanh", "Sigmoid", "Relu", "Reciprocal", "Softplus", "Identity", "LeakyRelu")),
    *((op, ("x", "y"), {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "LessOrEqual", "Greater",
                                      "GreaterOrEqual", "Equal")),
    *((op, ("i", "j"), {}) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Equal")),
    *((op, ("flag", "flag"), {}) for op in ("And", "Or", "Xor")),
    ("Not", ("flag",), {}), ("Sqrt", ("square",), {}), ("Log", ("square",), {}),
    ("Pow", ("x", "two"), {}), ("Pow", ("square", "half"), {}), ("Add", ("x", "row"), {}),
    ("Sum", ("x", "y", "row"), {}),
    ("Clip", ("x", "low", "high"), {}), ("Clip", ("x", "low"), {}), ("Gelu", ("x",), {}),
    ("Gelu", ("x",), {"approximate": "tanh"}), ("HardSigmoid", ("x",), {}),
    ("Cast", ("x",), {"to": 7}), ("Cast", ("i",), {"to": 1}), ("Cast", ("i",), {"to": 9}),
    ("Cast", ("flag",), {"to": 1}),
]  # fmt: skip
MOVEMENT: list[Case] = [
    ("Reshape", ("x", "shape"), {}), ("Unsqueeze", ("x", "one"), {}), ("Flatten", ("x",), {"axis": 2}),
    ("Expand", ("x4", "wide"), {}), ("Tile", ("x", "twice"), {}), ("Transpose", ("x",), {"perm": [2, 0, 1]}),
    ("Transpose", ("x",), {}), ("Concat", ("x", "y"), {"axis": -1}), ("Slice", ("x", "first", "last", "last"), {}),
    ("Slice", ("x", "last", "end", "last", "step"), {}), ("Slice", ("x", "middle", "scalars"), {}),
    ("Gather", ("table", "pick"), {}), ("Gather", ("x", "pick2"), {"axis": 1}),
    ("Gather", ("x", "negative"), {"axis": 1}),
    ("Gather", ("x", "scalar"), {"axis": 2}), ("Gather", ("i", "flagged"), {}),
    ("GatherElements", ("x2", "pick"), {"axis": 1}), ("GatherND", ("x", "pairs"), {}),
    ("ScatterND", ("x", "pairs", "updates"), {}), ("ScatterElements", ("x2", "pick", "upd"), {"axis": 1}),
    ("Pad", ("x", "pads"), {}), ("Trilu", ("x",), {"upper": 0}), ("OneHot", ("pick", "depth", "onoff"), {}),
    ("Where", ("flag3", "x", "y"), {}), ("CumSum", ("x", "scalar"), {}), ("Split", ("x", "sizes"), {"axis": 2}),
]  # fmt: skip
REDUCTIONS: list[Case] = [
    *((op, ("x", "last"), {}) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1",
                                         "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp")),
    ("ReduceMean", ("x", "one"), {"keepdims": 0}), ("ReduceSum", ("x",), {}), ("ArgMax", ("x",), {"axis": 2}),
    ("ArgMin", ("x",), {"axis": 1, "keepdims": 0}), ("Softmax", ("x",), {}), ("Softmax", ("x",), {"axis": 1}),
    ("LogSoftmax", ("x",), {}), ("LayerNormalization", ("x", "gain", "row"), {}),
    ("LayerNormalization", ("x", "gain"), {"epsilon": 1e-3}),
    ("MatMul", ("x", "w"), {}), ("MatMul", ("x", "yt"), {}), ("Einsum", ("x", "y"), {"equation": "bij,bkj->bik"}),
    ("InstanceNormalization", ("image", "four", "four"), {}), ("Add", ("i", "scalar"), {}),
    ("CumSum", ("j", "scalar"), {}), ("Gemm", ("x2", "w", "b"), {}),
    ("Gemm", ("x2", "wt", "b"), {"transB": 1}), ("Gemm", ("x2", "wt", "b"), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Conv", ("image", "kernel"), {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
]  # fmt: skip


def graph(cases: list[Case]) -> OnnxGraph:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Unsqueeze", ["x", "first"], ["x4"]),
        helper.make_node("Reshape", ["x", "flat"], ["x2"]), helper.make_node("Unsqueeze", ["flag", "axis2"], ["flag3"]),
        helper.make_node("Transpose", ["y"], ["yt"], perm=[0, 2, 1]),
        helper.make_node("Cast", ["flag"], ["flagged"], to=7), helper.make_node("Identity", ["flagged"], ["pick2"]),
    ]  # fmt: skip
    outputs = []
    for index, (op, inputs, attributes) in enumerate(cases):
        names = [f"{op}_{index}"] + ([f"{op}_{index}b"] if op == "Split" else [])
        nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        outputs += names
    constants = {
        **CONSTANTS, "flat": np.array([6, 8]), "axis2": np.array([2]), "scalars": np.array([2], np.int64)
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in FEEDS.items()
    ]
    made = helper.make_graph(
        nodes, "operators", [info for info in infos if info.name in used],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used],
    )  # fmt: skip
    return OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))


@pytest.mark.parametrize("cases", [ELEMENTWISE, MOVEMENT, REDUCTIONS], ids=["elementwise", "movement", "reductions"])
def test_operators_agree_with_the_interpreter(cases: list[Case]) -> None:
    model = graph(cases)
    assert_same(model, {spec.name: FEEDS[spec.name] for spec in model.inputs}, 2e-5)


@pytest.mark.parametrize("kind", ["rank 3 with a mask", "rank 4 causal", "rank 4 grouped, bool"])
def test_standard_attention(kind: str) -> None:
    feeds = {name: numbers(2, 6, 24, seed=seed) for seed, name in enumerate("qkv")}
    attributes: dict[str, Any] = {"q_num_heads": 3, "kv_num_heads": 3, "scale": 0.3}
    if kind.startswith("rank 3"):
        feeds["mask"] = numbers(6, 6, seed=7)
    else:
        attributes = {"is_causal": int("causal" in kind)}
        feeds = {name: numbers(2, 4 if name == "q" else 2, 6, 8, seed=3) for name in "qkv"}
        if "bool" in kind:
            feeds["mask"] = np.tril(np.ones((6, 6), bool))
    node = helper.make_node("Attention", list(feeds), ["y"], **attributes)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    made = helper.make_graph([node], "attention", infos, [helper.make_empty_tensor_value_info("y")])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    assert_same(OnnxGraph(ir.from_proto(proto)), feeds)


def test_rotary_and_head_norm_and_split_heads() -> None:
    x, cos, sin = numbers(2, 3, 5, 12, seed=1), numbers(5, 8, seed=2), numbers(5, 8, seed=3)
    for interleaved in (0, 1):
        kinds = {"x": (np.float32, (2, 3, 5, 12)), "cos": (np.float32, (5, 8)), "sin": (np.float32, (5, 8))}
        model = single("Rotary", kinds, {}, 20, size=8, interleaved=interleaved, sign=-1)
        assert_same(model, {"x": x, "cos": cos, "sin": sin})
    gain = numbers(12, seed=4)
    for kind in ("layer", "rms"):
        model = single("HeadNorm", {"x": (np.float32, (2, 3, 5, 12))}, {"gain": gain}, 20, kind=kind, epsilon=1e-5)
        assert_same(model, {"x": x})
    assert_same(single("SplitHeads", {"x": (np.float32, (2, 5, 12))}, {}, 20, heads=3), {"x": x[:, 0]})


def test_an_unknown_operator_is_named() -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="odd one")
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (("x", [2, 2]), ("y", []))
    ]
    made = helper.make_graph([node], "unknown", infos[:1], infos[1:])
    model = OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))
    with pytest.raises(UnsupportedOperator, match=r"Det.*odd one"):
        run_graph(model, {"x": numbers(2, 2)})


def test_shapes_that_depend_on_data_are_refused() -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="by data")
    infos = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [1]),
    ]
    made = helper.make_graph([node], "dynamic", infos, [helper.make_empty_tensor_value_info("y")])
    model = OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))
    with pytest.raises(UnsupportedOperator, match="decides shapes but depends on the data"):
        run_graph(model, {"x": numbers(4), "shape": np.array([4])})


def test_shape_arithmetic_is_folded() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 6])
    constants = [numpy_helper.from_array(np.array(v), n) for n, v in (("zero", [0]), ("rest", [2, 3]))]
    made = helper.make_graph(nodes, "shapes", [x], [helper.make_empty_tensor_value_info("y")], constants)
    model = OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)))
    program = specialise(model, {"x": (5, 6)})
    assert [node.op for node in program.nodes] == ["Reshape"] and program.shape("y") == (5, 2, 3)


def test_table_knows_every_composite() -> None:
    assert {f"rewriter:{name}" for name in ("Linear", "Attention", "SplitHeads", "Rotary", "HeadNorm")} <= set(TABLE)
