"""ONNX Runtime behind the interface of a runtime: right results, bound runs, the quantised rival, clear refusals."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.core.target import Target
from rewriter.graph.composites import composite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.runtimes import jobs
from rewriter.runtimes.base import Executable, Runtime, named, of_spec
from rewriter.runtimes.onnxruntime import OnnxRuntime, OnnxRuntimeInt8
from rewriter.runtimes.workers import Worker
from tests.runtimes.composite_graphs import constant, graph_of, tensor_input

TARGET = Target("llvm", "test", "generic", "x86_64", 1, 1, 8, 16, 32 << 10, 1 << 20, 1 << 24)
SPEC = "rewriter.runtimes.onnxruntime:OnnxRuntime"


def two_layers(opset: int = 17) -> OnnxGraph:
    rng = np.random.default_rng(0)
    arrays = {"w1": rng.normal(size=(32, 64)), "b1": rng.normal(size=64), "w2": rng.normal(size=(64, 32)) / 8}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    c = {name: constant(name, array) for name, array in arrays.items()}
    x = tensor_input("x", np.float32, ("B", "S", 32))
    up = composite("Linear", [x, c["w1"], c["b1"]], "hidden", activation="gelu")
    down = composite("Linear", [*up.outputs, c["w2"]], "y")
    return graph_of([up, down], [x], arrays, opset)


def batch(size: int, tokens: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(size).normal(size=(size, tokens, 32)).astype(np.float32)}


def built(runtime: Runtime, graph: OnnxGraph, folder: Path) -> Executable:
    return runtime.load(runtime.build(graph, {"x": (1, 4, 32)}, folder, TARGET), threads=1)


@pytest.mark.parametrize("kind", [OnnxRuntime, OnnxRuntimeInt8])
def test_it_is_a_runtime_and_available(kind: type[Runtime]) -> None:
    assert isinstance(kind(), Runtime)
    assert kind().available() is None
    assert type(of_spec(f"rewriter.runtimes.onnxruntime:{kind.__name__}")) is kind


def test_names_that_are_no_runtime() -> None:
    with pytest.raises(TypeError, match="does not name a runtime"):
        of_spec("pathlib:Path")
    with pytest.raises(ValueError, match="module:attribute"):
        named("pathlib")


def test_results_are_right_at_two_shapes(tmp_path: Path) -> None:
    graph = two_layers()
    executable = built(OnnxRuntime(), graph, tmp_path)
    for feeds in (batch(1, 4), batch(3, 7)):
        expected = Interpreter(graph, dtype=torch.float64).run(feeds)["y"].numpy()
        np.testing.assert_allclose(executable.run(feeds)["y"], expected, rtol=1e-4, atol=1e-4)


def test_bound_runs_compute_and_reuse_their_memory(tmp_path: Path) -> None:
    executable = built(OnnxRuntime(), two_layers(), tmp_path)
    first, second = executable.bind(batch(1, 4)), executable.bind(batch(3, 7))
    for _ in range(3):
        first()
        second()


def test_quantised_rival_is_close_and_smaller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph, runtime = two_layers(), OnnxRuntimeInt8()
    handlers = list(logging.getLogger().handlers)
    executable = built(runtime, graph, tmp_path)
    assert logging.getLogger().handlers == handlers and not caplog.records
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx"]
    quantised = load(tmp_path / "model.onnx")
    kinds = [node.op_type for node in quantised.topological()]
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds
    expected = Interpreter(graph).run(batch(3, 7))["y"].numpy()
    error = np.abs(executable.run(batch(3, 7))["y"] - expected)
    assert 0 < error.mean() < 0.05 * np.abs(expected).mean()


def test_quantised_rival_leaves_its_input_alone(tmp_path: Path) -> None:
    path = two_layers().save(tmp_path / "original.onnx")
    before = path.read_bytes()
    OnnxRuntimeInt8().build(load(path), {}, tmp_path / "built", TARGET)
    assert path.read_bytes() == before


def test_missing_and_wrong_inputs(tmp_path: Path) -> None:
    executable = built(OnnxRuntime(), two_layers(), tmp_path)
    with pytest.raises(DataError, match="no values for input 'x'"):
        executable.run({})
    with pytest.raises(DataError, match="no values for input 'x'"):
        executable.bind({})
    with pytest.raises(DataError, match="do not fit"):
        executable.run({"x": np.zeros((1, 4, 32), np.float64)})
    with pytest.raises(DataError, match="do not fit"):
        executable.run({"x": np.zeros((1, 4, 31), np.float32)})


def test_an_operator_it_does_not_know(tmp_path: Path) -> None:
    x = tensor_input("x", np.float32, ("B",))
    node = ir.Node("com.example", "Novelty", [x], name="n")
    node.outputs[0].name = "y"
    graph = graph_of([node], [x], {}, 17)
    graph.model.opset_imports["com.example"] = 1
    proto = ir.to_proto(graph.model)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises((UnsupportedOperator, ModelError), match="Novelty"):
        OnnxRuntime().load(tmp_path / "model.onnx", 1)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"model\.onnx"):
        OnnxRuntime().load(tmp_path / "model.onnx", 1)


def test_everything_in_a_worker(tmp_path: Path) -> None:
    graph = two_layers()
    path = tmp_path / "in.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())  # composites in it: not valid ONNX, and ours to read
    with Worker("onnxruntime", 1) as worker:
        artifact = worker.call("rewriter.runtimes.jobs:build", SPEC, path, {}, tmp_path / "out", TARGET)
        assert worker.call("rewriter.runtimes.jobs:open_executable", "m", SPEC, artifact, 1) is None
        found = worker.call("rewriter.runtimes.jobs:run", "m", batch(2, 3))
        with pytest.raises(DataError):
            worker.call("rewriter.runtimes.jobs:run", "m", {})
    np.testing.assert_allclose(found["y"], Interpreter(graph).run(batch(2, 3))["y"].numpy(), rtol=1e-4, atol=1e-4)


def test_jobs_run_in_this_process_too(tmp_path: Path) -> None:
    artifact = OnnxRuntime().build(two_layers(), {}, tmp_path, TARGET)
    jobs.open_executable("here", SPEC, artifact, 1)
    assert jobs.run("here", batch(1, 2))["y"].shape == (1, 2, 32)
