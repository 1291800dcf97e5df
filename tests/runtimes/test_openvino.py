"""OpenVINO behind the interface of a runtime: right results at any shapes, three precisions, clear refusals."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes import jobs
from rewriter.runtimes.base import Calibrated, Executable, Runtime, of_spec
from rewriter.runtimes.openvino import OpenVino, OpenVinoBf16, OpenVinoInt8, settings
from rewriter.runtimes.workers import Worker
from tests.runtimes.composite_graphs import graph_of, tensor_input
from tests.runtimes.two_layers import TARGET, batch, two_layers

pytestmark = pytest.mark.skipif(util.find_spec("openvino") is None, reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(util.find_spec("nncf") is None, reason="nncf is not installed")

SHAPES = {"x": (1, 4, 32)}


def built(runtime: Runtime, graph: OnnxGraph, folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Executable:
    return runtime.load(runtime.build(graph, shapes, folder, TARGET), threads=1)


def expected(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return Interpreter(graph, dtype=torch.float64).run(feeds)["y"].numpy()


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, **batch(24, 4))
    return path


@pytest.mark.parametrize("kind", [OpenVino, OpenVinoBf16, OpenVinoInt8])
def test_it_is_a_runtime(kind: type[Runtime]) -> None:
    assert type(of_spec(f"rewriter.runtimes.openvino:{kind.__name__}")) is kind
    assert isinstance(kind(), Calibrated) == (kind is OpenVinoInt8)


@pytest.mark.parametrize("shapes", [SHAPES, {}], ids=["static", "dynamic"])
def test_results_are_right_at_several_shapes(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    graph = two_layers()
    executable = built(OpenVino(), graph, tmp_path, shapes)
    for feeds in (batch(1, 4), batch(3, 7), batch(1, 4), batch(2, 1)):
        np.testing.assert_allclose(executable.run(feeds)["y"], expected(graph, feeds), rtol=1e-4, atol=1e-4)


def test_a_view_of_larger_memory_is_read_right(tmp_path: Path) -> None:
    graph, whole = two_layers(), batch(4, 9)["x"]
    feeds = {"x": whole[1:3, ::2]}
    np.testing.assert_allclose(
        built(OpenVino(), graph, tmp_path).run(feeds)["y"], expected(graph, feeds), rtol=1e-4, atol=1e-4
    )


def test_bound_runs_keep_their_inputs(tmp_path: Path) -> None:
    graph = two_layers()
    executable = built(OpenVino(), graph, tmp_path)
    first, second = executable.bind(batch(1, 4)), executable.bind({"x": batch(3, 9)["x"][:, :7]})
    for _ in range(3):
        first()
        second()
    np.testing.assert_allclose(executable.run(batch(1, 4))["y"], expected(graph, batch(1, 4)), rtol=1e-4, atol=1e-4)


def test_bf16_is_rounded_and_close_or_refused(tmp_path: Path) -> None:
    runtime, graph = OpenVinoBf16(), two_layers()
    refusal = runtime.available()
    if refusal is not None:
        assert refusal.code == "no-instructions"
        return
    wanted = expected(graph, batch(3, 7))
    error = np.abs(built(runtime, graph, tmp_path).run(batch(3, 7))["y"] - wanted)
    assert 1e-4 < error.mean() / np.abs(wanted).mean() < 0.03


def test_bf16_is_refused_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("rewriter.runtimes.openvino._core", Plain)
    refusal = OpenVinoBf16().available()
    assert refusal is not None and refusal.code == "no-instructions" and "BF16" in refusal.why
    assert OpenVino().available() is None


@needs_nncf
def test_int8_is_quantised_on_samples(tmp_path: Path, samples: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime, graph = OpenVinoInt8(), two_layers()
    runtime.samples = samples
    executable = built(runtime, graph, tmp_path / "int8")
    assert "FakeQuantize" in (tmp_path / "int8" / "model.xml").read_text()
    assert sorted(file.name for file in (tmp_path / "int8").iterdir()) == ["model.bin", "model.xml"]
    captured = capfd.readouterr()
    assert not captured.out and not captured.err
    wanted = expected(graph, batch(3, 7))
    error = np.abs(executable.run(batch(3, 7))["y"] - wanted)
    assert 0 < error.mean() < 0.05 * np.abs(wanted).mean()


@needs_nncf
def test_quantising_sends_nothing_home() -> None:
    from rewriter.runtimes.openvino_int8 import _nncf

    _nncf()
    from nncf.telemetry import wrapper

    assert type(wrapper.telemetry).__name__ == "MagicMock"
    assert sys.modules.get("openvino_telemetry", "absent") is not None


@needs_nncf
def test_int8_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs samples"):
        OpenVinoInt8().build(two_layers(), SHAPES, tmp_path, TARGET)


@needs_nncf
def test_int8_with_samples_of_something_else_is_refused(tmp_path: Path) -> None:
    runtime = OpenVinoInt8()
    runtime.samples = tmp_path / "other.npz"
    np.savez(runtime.samples, z=np.zeros((3, 4)))
    with pytest.raises(DataError, match="no values for input 'x'"):
        runtime.build(two_layers(), SHAPES, tmp_path / "int8", TARGET)


def test_missing_and_wrong_inputs(tmp_path: Path) -> None:
    executable = built(OpenVino(), two_layers(), tmp_path)
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
    with pytest.raises((UnsupportedOperator, ModelError), match="Novelty"):
        OpenVino().build(graph, {}, tmp_path, TARGET)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("not a model")
    with pytest.raises(ModelError, match=r"model\.xml"):
        OpenVino().load(tmp_path / "model.xml", 1)


def test_it_says_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "nncf" else there(name))
    refusal = OpenVinoInt8().available()
    assert refusal is not None and refusal.code == "not-installed" and "nncf" in refusal.why
    assert OpenVino().available() is None
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    for kind in (OpenVino, OpenVinoBf16, OpenVinoInt8):
        refusal = kind().available()
        assert refusal is not None and "attention-rewriter[openvino]" in refusal.why


def test_threads_and_precision_are_told() -> None:
    assert settings(2, "f32")["INFERENCE_NUM_THREADS"] == 2
    assert settings(2, "f32")["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_PRECISION_HINT" not in settings(1, None)
    assert settings(1, None)["ENABLE_CPU_PINNING"] is False


def test_everything_in_a_worker(tmp_path: Path) -> None:
    graph, spec = two_layers(), "rewriter.runtimes.openvino:OpenVino"
    path = tmp_path / "in.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    with Worker("openvino", 1) as worker:
        artifact = worker.call(f"{jobs.__name__}:build", spec, path, SHAPES, tmp_path / "out", TARGET)
        assert worker.call(f"{jobs.__name__}:open_executable", "m", spec, artifact, 1) is None
        found = worker.call(f"{jobs.__name__}:run", "m", batch(2, 3))
        with pytest.raises(DataError):
            worker.call(f"{jobs.__name__}:run", "m", {})
    np.testing.assert_allclose(found["y"], expected(graph, batch(2, 3)), rtol=1e-4, atol=1e-4)
