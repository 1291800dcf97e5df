"""One query over a cache, as a graph: which kernel it gets, and caches of bfloat16 that are read as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm import compile as compiling
from tests.runtimes.composite_graphs import single
from tests.runtimes.tvm.harness import numbers, run_graph, run_reference, target
from tests.runtimes.tvm.test_elsewhere import cross, run_library


def decoding(
    queries: int = 1, keys: int = 300, dim: int = 64, narrow: bool = False
) -> tuple[OnnxGraph, dict[str, np.ndarray]]:
    """Six heads on two of keys, whose unused places are masked."""
    kind = ml_dtypes.bfloat16 if narrow else np.float32
    shapes = {"query": (1, 6, queries, dim), "key": (1, 2, keys, dim), "value": (1, 2, keys, dim)}
    feeds = {role: numbers(*shape, seed=seed).astype(kind) for seed, (role, shape) in enumerate(shapes.items())}
    feeds["bias"] = np.where(np.arange(keys) < keys - 100, 0, -np.inf).astype(kind)[None, None, None]
    heads = {f"{role}_heads": shape[1] for role, shape in shapes.items()}
    maps = {"query_head_of": list(range(6)), "key_head_of": [0, 0, 0, 1, 1, 1], "value_head_of": [0, 0, 0, 1, 1, 1]}
    inputs = {name: (array.dtype, array.shape) for name, array in feeds.items()}
    return single("Attention", inputs, {}, 20, heads=6, scale=dim**-0.5, bias_kind="add", **heads, **maps), feeds


def kernels_of(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> str:
    module = compiling.lower(graph, [{name: array.shape for name, array in feeds.items()}], target())
    return " ".join(variable.name_hint for variable in module.functions.get_global_vars())


@pytest.mark.parametrize(
    ("queries", "dim", "kernel"), [(1, 64, "decode"), (5, 64, "decode"), (6, 64, "flash"), (1, 20, "flash")]
)
def test_few_queries_of_whole_vectors_stream_the_cache(queries: int, dim: int, kernel: str) -> None:
    graph, feeds = decoding(queries, dim=dim)
    assert f"{kernel}_" in kernels_of(graph, feeds)
    for threads in (1, 2):
        got, wanted = run_graph(graph, feeds, threads)["y"], run_reference(graph, feeds)["y"]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 7])
def test_a_bfloat16_cache_is_not_copied_for_few_queries(queries: int) -> None:
    graph, feeds = decoding(queries, narrow=True)
    module = compiling.lower(graph, [{name: array.shape for name, array in feeds.items()}], target())
    widened = [node.inputs[0] for node in module.programs[0].nodes if node.op == "Cast"]
    assert ("key" in widened) == ("value" in widened) == (queries > 5)
    wide = {name: array.astype(np.float32) for name, array in feeds.items()}
    exact, _ = decoding(queries)
    got, wanted = run_graph(graph, feeds)["y"], run_reference(exact, wide)["y"]
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 9])
def test_neon_computes_the_same(tmp_path: Path, queries: int) -> None:
    built_for, emulator = cross(), shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    graph, feeds = decoding(queries, keys=130)
    got = run_library(graph, feeds, tmp_path, built_for, (emulator,))
    np.testing.assert_allclose(got, run_reference(graph, feeds)["y"].ravel(), rtol=1e-5, atol=2e-6)
