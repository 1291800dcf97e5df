"""Compiles single templates and small graphs in the process, without writing artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from rewriter.core.target import Target
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm import compile as compiling
from rewriter.runtimes.tvm.target import detect, tvm_target

torch.set_num_threads(1)


@cache
def target(threads: int = 1) -> Target:
    return detect("cpu", threads)


def needs(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(feature not in target().features, reason=f"this processor has no {feature}")


def run_kernel(
    function: Any, inputs: Sequence[np.ndarray], *outputs: tuple[int, ...], dtypes: Sequence[str] = ()
) -> list[np.ndarray]:
    """Outputs begin as garbage (7), so that what is not written is seen; they are float32 unless `dtypes` says so."""
    return call_kernel(compile_kernel(function), inputs, *outputs, dtypes=dtypes)


def compile_kernel(function: Any) -> Any:
    """One template as a function."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=tvm_target(target()))["kernel"]


def call_kernel(
    compiled: Any, inputs: Sequence[np.ndarray], *outputs: tuple[int, ...], dtypes: Sequence[str] = ()
) -> list[np.ndarray]:
    """As `run_kernel`, for what is compiled."""
    kinds = dtypes or ["float32"] * len(outputs)
    results = [tvm.runtime.tensor(np.full(shape, 7, kind)) for shape, kind in zip(outputs, kinds, strict=True)]
    compiled(*(tvm.runtime.tensor(array) for array in inputs), *results)
    return [result.numpy() for result in results]


def run_graph(graph: OnnxGraph, feeds: Mapping[str, np.ndarray], threads: int = 1) -> dict[str, np.ndarray]:
    """The graph through fusion, lowering and the virtual machine."""
    module = compiling.lower(graph, [{name: array.shape for name, array in feeds.items()}], target(threads))
    machine = relax.VirtualMachine(tvm.compile(module.functions, target=tvm_target(target(threads))), tvm.cpu())
    inputs = [tvm.runtime.tensor(np.ascontiguousarray(feeds[name])) for name in module.programs[0].inputs]
    weights = [tvm.runtime.tensor(module.parameters[name]) for name in module.arguments[0]]
    results = machine["bucket_0"](*inputs, *weights)
    return {name: result.numpy() for name, result in zip(module.programs[0].outputs, results, strict=True)}


def run_reference(graph: OnnxGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph in float64, by the interpreter."""
    return {name: value.numpy() for name, value in Interpreter(graph, torch.float64).run(feeds).items()}


def assert_same(graph: OnnxGraph, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-5, threads: int = 1) -> None:
    """TVM and the float64 interpreter agree on every output: shapes, values, places of NaN."""
    got, wanted = run_graph(graph, feeds, threads), run_reference(graph, feeds)
    assert set(got) == set(wanted)
    for name, reference in wanted.items():
        assert got[name].shape == reference.shape, name
        if reference.dtype.kind == "f":
            np.testing.assert_allclose(got[name], reference, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], reference, err_msg=name)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
