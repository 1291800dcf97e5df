"""Torch behind the interface of a runtime: whole families against double precision, every mask, any shapes."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from models.fixtures import Pack, read_pack
from models.tvm_coverage import check
from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import to_numpy, to_torch
from rewriter.runtimes import jobs
from rewriter.runtimes.base import Caching, Executable, Runtime, of_spec
from rewriter.runtimes.torch_runtime import TorchCompile, TorchEager, traced
from rewriter.runtimes.workers import Worker
from tests.runtimes.composite_graphs import graph_of, single, tensor_input
from tests.runtimes.two_layers import TARGET, batch, two_layers

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHAPES = {"x": (1, 4, 32)}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="TorchInductor needs a C++ compiler")
# pack, cell and the number of sites that are fused
CELLS = [
    ("l17", "bert.eager.l17", 4),
    ("d18", "bloom_past.eager.d18", 4),  # positions by distance, and a cache
    ("d18", "gpt2_past.sdpa.d18", 4),
    ("d23", "llama.sdpa.d23", 4),  # rotation, groups, and attention as one operator
    ("l17", "talking_heads.eager.l17", 0),  # nothing is rewritten: operator by operator
    ("d18", "whisper_dec_past.sdpa.d18", 6),  # across two sequences
    ("d18", "vit.sdpa.d18", 4),
    ("t17", "t5.eager.t17", 10),
]


@cache
def pack(name: str) -> Pack:
    return read_pack(FIXTURES / f"{name}.tar.xz")


def run_with_torch(graph: OnnxGraph, feeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run_traced(graph, one) for one in feeds]


def run_traced(graph: OnnxGraph, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Traced on constant inputs of these shapes, run on these."""
    arrays = {spec.name: np.asarray(feeds[spec.name]).astype(spec.dtype) for spec in graph.inputs}
    program, _ = traced(graph, tuple(array.shape for array in arrays.values()))
    with torch.inference_mode():
        results = program(*map(to_torch, arrays.values()))
    return {spec.name: to_numpy(result) for spec, result in zip(graph.outputs, results, strict=True)}


def expected(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return Interpreter(graph, dtype=torch.float64).run(feeds)["y"].numpy()


def built(runtime: Runtime, graph: OnnxGraph, folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Executable:
    return runtime.load(runtime.build(graph, shapes, folder, TARGET), threads=1)


@pytest.mark.parametrize(("packed", "cell", "sites"), CELLS, ids=[cell for _, cell, _ in CELLS])
def test_family_agrees_with_onnxruntime(packed: str, cell: str, sites: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(pack(packed).models[cell], path)
    found = check(path, rounds=(0, 1), run=run_with_torch)
    assert found.verdict == "ok", found
    assert found.sites == sites


def targets(graph: OnnxGraph, shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    program, _ = traced(graph, shapes)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_composites_are_the_calls_people_write() -> None:
    assert targets(two_layers(), ((1, 4, 32),)) == ["aten.linear.default", "aten.gelu.default", "aten.linear.default"]


HEADS = {"heads": 4, "scale": 0.5, "query_heads": 4, "query_head_of": [0, 1, 2, 3]}
PLAIN = HEADS | {
    f"{role}_{key}": value for role in ("key", "value") for key, value in (("heads", 4), ("head_of", [0, 1, 2, 3]))
}
GROUPED = HEADS | {
    f"{role}_{key}": value for role in ("key", "value") for key, value in (("heads", 2), ("head_of", [0, 0, 1, 1]))
}
ODD = HEADS | {"key_heads": 2, "key_head_of": [0, 1, 1, 0], "value_heads": 3, "value_head_of": [2, 0, 1, 1]}
NEVER = np.float32(-np.inf)


def attention(
    groups: dict[str, Any], bias: np.ndarray | None = None, fed: bool = False, **attributes: Any
) -> OnnxGraph:
    inputs: dict[str, Any] = {"q": (np.float32, ("B", "S", 32))}
    inputs |= {
        name: (np.float32, ("B", "T", 8 * groups[f"{role}_heads"])) for name, role in (("k", "key"), ("v", "value"))
    }
    constants = {}
    if bias is not None and fed:
        inputs["bias"] = (bias.dtype, tuple(f"b{axis}" for axis in range(bias.ndim)))
    elif bias is not None:
        constants = {"bias": bias}
    kind = "none" if bias is None else "bool" if bias.dtype == bool else "add"
    return single("Attention", inputs, constants, 17, **groups, bias_kind=kind, **attributes)


def operands(
    graph: OnnxGraph, queries: int, keys: int, bias: np.ndarray | None, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"q": queries, "k": keys, "v": keys}
    specs = {spec.name: spec for spec in graph.inputs}
    feeds = {name: rng.normal(size=(2, n, specs[name].shape[2])).astype(np.float32) for name, n in sizes.items()}
    return feeds | ({"bias": bias} if bias is not None and "bias" in specs else {})


def agrees(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(run_traced(graph, feeds)["y"], expected(graph, feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [PLAIN, GROUPED, ODD], ids=["plain", "grouped", "odd"])
def test_heads_are_picked_as_the_composite_says(groups: dict[str, Any]) -> None:
    graph = attention(groups)
    agrees(graph, operands(graph, 5, 7, None))
    assert "aten.scaled_dot_product_attention.default" in targets(
        graph, ((2, 5, 32), (2, 7, 8 * groups["key_heads"]), (2, 7, 8 * groups["value_heads"]))
    )


def hidden(shape: tuple[int, ...], empty_rows: bool) -> np.ndarray:
    """True where a query may attend; with `empty_rows`, one row (or item) without any key."""
    allowed = np.random.default_rng(1).random(shape) < 0.6
    allowed[..., 0] = True
    if empty_rows:
        allowed[(1,) if shape[0] > 1 else (..., slice(2, 3), slice(None))] = False
    return allowed


@pytest.mark.parametrize("fed", [True, False], ids=["input", "constant"])
@pytest.mark.parametrize("kind", ["bool", "add", "finite"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (1, 4, 5, 7), (2, 4, 5, 7), (5, 7), (4, 5, 7)], ids=str)
def test_masks_of_every_shape(shape: tuple[int, ...], kind: str, fed: bool) -> None:
    allowed = hidden(shape, empty_rows=False)
    low = NEVER if kind == "add" else np.finfo(np.float32).min
    bias = allowed if kind == "bool" else np.where(allowed, np.float32(0.3), low)
    graph = attention(GROUPED, bias, fed)
    agrees(graph, operands(graph, 5, 7, bias))


@pytest.mark.parametrize("fed", [True, False], ids=["input", "constant"])
@pytest.mark.parametrize("kind", ["bool", "add"])
@pytest.mark.parametrize("empty_rows", ["nan", "zero"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (5, 7)], ids=str)
def test_rows_without_any_key_give_what_the_composite_says(
    shape: tuple[int, ...], empty_rows: str, kind: str, fed: bool
) -> None:
    allowed = hidden(shape, empty_rows=True)
    bias = allowed if kind == "bool" else np.where(allowed, np.float32(0), NEVER)
    graph = attention(PLAIN, bias, fed, empty_rows=empty_rows)
    feeds = operands(graph, 5, 7, bias)
    agrees(graph, feeds)
    assert np.isnan(run_traced(graph, feeds)["y"]).any() == (empty_rows == "nan")


@pytest.mark.parametrize("kind", ["bool", "add"])
def test_a_causal_constant_is_said_not_given(kind: str) -> None:
    allowed = np.tril(np.ones((6, 6), bool))
    bias = allowed if kind == "bool" else np.where(allowed, np.float32(0), np.finfo(np.float32).min)
    graph = attention(GROUPED, bias)
    agrees(graph, operands(graph, 6, 6, None))
    program, _ = traced(graph, ((2, 6, 32), (2, 6, 16), (2, 6, 16)))
    fused = next(node for node in program.graph.nodes if "scaled_dot" in str(node.target))
    assert fused.args[5] is True if len(fused.args) > 5 else fused.kwargs["is_causal"] is True
    almost = bias.copy()
    almost[0, 5] = almost[0, 0]
    other = attention(GROUPED, almost)
    agrees(other, operands(other, 6, 6, None))


def test_what_the_fused_call_does_not_mean_is_written_out() -> None:
    graph = attention(PLAIN, softcap=2.0)
    agrees(graph, operands(graph, 5, 7, None))
    assert not any("scaled_dot" in name for name in targets(graph, ((2, 5, 32), (2, 7, 32), (2, 7, 32))))
    narrow = attention(PLAIN, precision="bf16")
    feeds = operands(narrow, 5, 7, None)
    np.testing.assert_allclose(run_traced(narrow, feeds)["y"], Interpreter(narrow).run(feeds)["y"].numpy(), atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_number_formats_mean_the_same(precision: str) -> None:
    weight = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)
    graph = single("Linear", {"x": (np.float32, ("B", "S", 32))}, {"w": weight}, 17, precision=precision)
    feeds = batch(2, 5)
    np.testing.assert_allclose(run_traced(graph, feeds)["y"], Interpreter(graph).run(feeds)["y"].numpy(), atol=1e-5)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotation_and_norms(interleaved: int) -> None:
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=(1, 1, 5, 6)).astype(np.float32) for name in ("cos", "sin")}
    inputs = {"x": (np.float32, ("B", 2, 5, 8))}
    graph = single("Rotary", inputs, tables, 17, size=6, interleaved=interleaved, sign=-1)
    feeds = {"x": rng.normal(size=(2, 2, 5, 8)).astype(np.float32)}
    agrees(graph, feeds)
    for kind in ("layer", "rms"):
        gain = {"gain": rng.normal(size=8).astype(np.float32)}
        agrees(single("HeadNorm", inputs, gain, 17, kind=kind, epsilon=1e-5), feeds)


@pytest.mark.parametrize("shapes", [SHAPES, {}], ids=["static", "as they come"])
def test_results_are_right_at_several_shapes(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    graph = two_layers()
    executable = built(TorchEager(), graph, tmp_path, shapes)
    for feeds in (batch(1, 4), batch(3, 7), batch(1, 4), batch(2, 1)):
        np.testing.assert_allclose(executable.run(feeds)["y"], expected(graph, feeds), rtol=1e-4, atol=1e-4)
    first, second = executable.bind(batch(1, 4)), executable.bind({"x": batch(3, 9)["x"][:, :7]})
    for _ in range(2):
        first()
        second()


def test_the_exported_program_runs_without_us(tmp_path: Path) -> None:
    graph = two_layers()
    folder = TorchEager().build(graph, SHAPES, tmp_path, TARGET)
    result = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(batch(1, 4)["x"]))[0]
    np.testing.assert_allclose(result.numpy(), expected(graph, batch(1, 4)), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_compiled_programs_are_right_and_leave_nothing_elsewhere(tmp_path: Path) -> None:
    graph, runtime = two_layers(), TorchCompile()
    assert isinstance(runtime, Caching)
    runtime.cache = tmp_path / "cache"
    executable = built(runtime, graph, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["graph.onnx", "model.pt2", "torch.json"]
    executable.bind(batch(1, 4))()
    np.testing.assert_allclose(executable.run(batch(1, 4))["y"], expected(graph, batch(1, 4)), rtol=1e-4, atol=1e-4)


def test_it_says_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refusal = TorchCompile().available()
    assert refusal is not None and refusal.code == "no-compiler" and "g++" in refusal.why
    assert TorchEager().available() is None


@pytest.mark.parametrize("kind", [TorchEager, TorchCompile])
def test_it_is_a_runtime(kind: type[Runtime]) -> None:
    assert type(of_spec(f"rewriter.runtimes.torch_runtime:{kind.__name__}")) is kind


def test_work_that_depends_on_data_is_named(tmp_path: Path) -> None:
    x = tensor_input("x", np.float32, ("B",))
    node = ir.Node("", "NonZero", [x], name="where")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph = graph_of([node], [x], {}, 17)
    with pytest.raises(UnsupportedOperator, match=r"NonZero \(node 'where'\).*depends on data"):
        TorchEager().build(graph, {"x": (3,)}, tmp_path, TARGET)


def test_missing_and_wrong_inputs(tmp_path: Path) -> None:
    executable = built(TorchEager(), two_layers(), tmp_path)
    with pytest.raises(DataError, match="no values for input 'x'"):
        executable.run({})
    with pytest.raises(DataError, match="is float64"):
        executable.run({"x": np.zeros((1, 4, 32), np.float64)})
    with pytest.raises(DataError, match=r"\[1, 4, 31\]"):
        executable.bind({"x": np.zeros((1, 4, 31), np.float32)})


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no torch artifact"):
        TorchEager().load(tmp_path, 1)


def test_everything_in_a_worker(tmp_path: Path) -> None:
    graph, spec = two_layers(), "rewriter.runtimes.torch_runtime:TorchEager"
    path = tmp_path / "in.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    with Worker("torch", 1) as worker:
        artifact = worker.call(f"{jobs.__name__}:build", spec, path, SHAPES, tmp_path / "out", TARGET)
        assert worker.call(f"{jobs.__name__}:open_executable", "m", spec, artifact, 1) is None
        found = worker.call(f"{jobs.__name__}:run", "m", batch(2, 3))
    np.testing.assert_allclose(found["y"], expected(graph, batch(2, 3)), rtol=1e-4, atol=1e-4)
