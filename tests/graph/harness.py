"""One-node models, run by our interpreter and by an independent engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import to_numpy

torch.set_num_threads(1)


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def whole(*shape: int, low: int = -5, high: int = 5, seed: int = 0, dtype: Any = np.int64) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def i64(*items: int) -> np.ndarray:
    return np.array(items, dtype=np.int64)


def one_node(
    op: str,
    inputs: Sequence[np.ndarray | None],
    opset: int,
    outputs: Sequence[str] = ("y0",),
    domain: str = "",
    constant: Sequence[int] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node; inputs are named x0, x1, ...; those in `constant` are initialisers."""
    names = ["" if array is None else f"x{i}" for i, array in enumerate(inputs)]
    node = helper.make_node(op, names, list(outputs), domain=domain, **attributes)
    given = [(name, array) for name, array in zip(names, inputs, strict=True) if array is not None]
    fed = [(name, array) for name, array in given if int(name[1:]) not in constant]
    weights = [numpy_helper.from_array(array, name) for name, array in given if int(name[1:]) in constant]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs if name]
    graph = helper.make_graph([node], "one", infos, results, weights)
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 22 else 10 if opset < 25 else 13)


def graph_of(proto: onnx.ModelProto) -> OnnxGraph:
    return OnnxGraph(ir.from_proto(proto))


def ours(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], dtype: torch.dtype | None = None) -> list[np.ndarray]:
    results = Interpreter(graph_of(proto), dtype).run(feeds)
    return [to_numpy(results[output.name]) for output in proto.graph.output]


def by_reference(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(array) for array in ReferenceEvaluator(proto).run(None, dict(feeds))]


def by_onnxruntime(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(_typed(proto).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, dict(feeds))]


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime wants outputs without a type to have none at all."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for output in copy.graph.output:
        if not output.type.WhichOneof("value"):
            output.ClearField("type")
    return copy


def compare(
    op: str,
    inputs: Sequence[np.ndarray | None],
    opset: int = 20,
    outputs: Sequence[str] = ("y0",),
    domain: str = "",
    runtime: bool = False,
    tolerance: float = 2e-5,
    constant: Sequence[int] = (),
    double: bool = True,
    **attributes: Any,
) -> list[np.ndarray]:
    """Assert that our result equals the independent one in dtype, shape and value, in float64 too; returns ours."""
    proto = one_node(op, inputs, opset, outputs, domain, constant, **attributes)
    fed = {f"x{i}": array for i, array in enumerate(inputs) if array is not None and i not in constant}
    expected = by_onnxruntime(proto, fed) if runtime or domain else by_reference(proto, fed)
    found = ours(proto, fed)
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape, (mine.shape, other.shape)
        assert mine.dtype == other.dtype, (mine.dtype, other.dtype)
        np.testing.assert_allclose(
            mine.astype(np.float64), other.astype(np.float64), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    if double:
        _compare_in_double(proto, fed, expected)
    return found


def _compare_in_double(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], expected: list[np.ndarray]) -> None:
    """The same with every float forced to float64: floats stay float64, and values stay what they are."""
    for mine, other in zip(ours(proto, feeds, torch.float64), expected, strict=True):
        if other.dtype.kind in "fV":
            assert mine.dtype == np.float64
        np.testing.assert_allclose(
            mine.astype(np.float64), other.astype(np.float64), rtol=1e-2, atol=1e-3, equal_nan=True
        )
