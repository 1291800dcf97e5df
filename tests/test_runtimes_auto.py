"""Which runtime, precision and graph is fastest: all that are here are timed, and what wins is shipped as it ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import rewriter
from rewriter import pipeline
from rewriter.cli import main
from rewriter.core.errors import ModelError, OptionError
from rewriter.core.measurement import Measurement
from rewriter.measurement.bench import Subject
from rewriter.measurement.race import RaceResult, Rules
from rewriter.search import decision, engines, finals
from rewriter.search.engines import PEERS, Engine

SCHEMA = json.loads((Path(rewriter.__file__).parent / "report" / "schema.json").read_text())
BROKEN = "tests.runtimes.broken_runtimes"
needs_openvino = pytest.mark.skipif(
    util.find_spec("openvino") is None or util.find_spec("nncf") is None, reason="openvino or nncf is not installed"
)


@pytest.fixture(autouse=True, scope="module")
def one_length() -> Iterator[None]:
    """The lengths of the data's requests are a matter of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "serve_lengths", lambda session, outcome: None)
        yield


def optimise(encoder: Path, folder: Path, *words: object) -> dict[str, Any]:
    common = ["--effort", "quick", "-o", folder / "out", "--cache-dir", folder / "cache"]
    assert main([str(word) for word in (encoder, *common, *words)]) == 0
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


def timed(milliseconds: dict[str, float]) -> Any:
    """A race in which everybody takes as long as their runtime is said to."""

    def raced(session: object, subjects: dict[str, Subject], rules: Rules) -> RaceResult:
        blocks = {
            name: tuple((milliseconds[subject.runtime.rpartition(":")[2]] * 1e-3,) for _ in range(12))
            for name, subject in subjects.items()
        }
        return RaceResult({name: Measurement(name, one) for name, one in blocks.items()}, {}, "narrow")

    return raced


OPENVINO_FAST = {"OnnxRuntime": 9.0, "OnnxRuntimeInt8": 9.0, "OpenVino": 6.0, "OpenVinoBf16": 3.0, "OpenVinoInt8": 1.0}


@pytest.fixture(scope="module")
def rounded(encoder: Path, encoder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """OpenVINO's int8 is said to be fastest; everything but the times is real."""
    folder = tmp_path_factory.mktemp("rounded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finals, "_raced", timed(OPENVINO_FAST))
        words = ["--runtime", "openvino", "--data", encoder_data, "--max-drop", "20%", "--passes", "exact_cleanup"]
        report = optimise(encoder, folder, *words)
    return folder / "out", report


@needs_openvino
def test_what_rounds_wins_only_with_a_certificate(rounded: tuple[Path, dict[str, Any]]) -> None:
    _, report = rounded
    assert report["best"]["runtime"] == "openvino-int8" and not report["best"]["kept_original"]
    assert report["baseline"]["runtime"] == "openvino"
    assert report["metric"]["certified"] and 0 < report["metric"]["drop"]["median"] < 0.2
    assert report["speedup"]["openvino-int8/model.xml"]["onnxruntime"]["median"] == pytest.approx(9.0)
    kept, *others = report["runtimes"]
    assert (kept["runtime"], kept["precision"], kept["outcome"]) == ("openvino-int8", "int8", "kept")
    assert {row["runtime"] for row in others} >= {"openvino", "onnxruntime"}
    assert kept["against_original"]["median"] == pytest.approx(6.0)


@needs_openvino
def test_the_winner_is_shipped_as_it_ran(
    rounded: tuple[Path, dict[str, Any]], encoder: Path, encoder_data: Path, encoder_arrays: dict[str, np.ndarray]
) -> None:
    folder, report = rounded
    assert sorted(file.name for file in (folder / "openvino-int8").iterdir()) == ["model.bin", "model.xml"]
    assert report["best"]["load"] in (folder / "report.md").read_text()
    feeds = {name: encoder_arrays[name][:3] for name in ("input_ids", "attention_mask")}
    model = rewriter.load(folder)
    cosines = (model(**feeds)["output"] * reference(encoder, feeds)).sum(1)
    assert np.all(cosines > 0.8) and np.any(cosines < 1 - 1e-6)
    assert model(**{name: array[:, :7] for name, array in feeds.items()})["output"].shape == (3, 24)
    checks = rewriter.verify(folder, encoder, encoder_data)
    assert checks["ok"], checks
    assert "drop" in next(check["detail"] for check in checks["checks"] if check["check"] == "openvino-int8")


def reference(encoder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    from rewriter.graph.interpreter import Interpreter
    from rewriter.graph.onnx import load

    return Interpreter(load(encoder)).run(feeds)["output"].numpy()


@needs_openvino
def test_a_folder_whose_artifact_or_runtime_is_gone_says_so(
    rounded: tuple[Path, dict[str, Any]], tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = rounded
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match=r"openvino-int8/model\.xml is missing"):
        rewriter.load(tmp_path)
    there = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "openvino" else there(name))
    with pytest.raises(ModelError, match=r"attention-rewriter\[openvino\]"):
        rewriter.load(folder)
    checks = rewriter.verify(folder, encoder)
    assert not checks["ok"]
    assert "not installed" in next(check["detail"] for check in checks["checks"] if check["check"] == "openvino-int8")


def test_a_failing_runtime_costs_only_itself(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(key: str, kind: str) -> Engine:
        return Engine(key, f"{BROKEN}:{kind}", "auto", "as the graph", "standard", "model.onnx", "load({})")

    kinds = {"one": "Absent", "two": "CannotBuild", "three": "EndsBuilding", "four": "EndsTiming"}
    peers = (PEERS[0], *(broken(key, kind) for key, kind in kinds.items()), engines.BY_KEY["torch-eager"])
    monkeypatch.setattr(engines, "PEERS", peers)
    monkeypatch.setattr(finals, "PEERS", peers)
    monkeypatch.setitem(decision._RACE_S, "quick", 0.5)
    report = optimise(encoder, tmp_path, "--runtime", "auto", "--shape", "input_ids=1x16", "--passes", "head_pruning")
    notes = " | ".join(report["notes"])
    assert "one took no part: absent is not installed; pip install absent" in notes
    assert "original@two could not be built and takes no part: this one cannot run operator Gather" in notes
    assert "original@three could not be built" in notes and "exit code 3" in notes
    assert "original@four failed while being timed: crash" in notes and "exit code 4" in notes
    assert {row["runtime"] for row in report["runtimes"]} >= {"tvm", "onnxruntime", "torch-eager"}
    kept = next(row for row in report["runtimes"] if row["outcome"] == "kept")
    assert kept["latency_s"]["median"] == min(row["latency_s"]["median"] for row in report["runtimes"])
    assert "runtime: " in pipeline.summary(report) and "## Runtimes" in (tmp_path / "out/report.md").read_text()


def test_openvino_is_refused_at_once_where_it_is_not_installed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "openvino" else there(name))
    with pytest.raises(OptionError, match="openvino is not installed"):
        rewriter.optimize(encoder, runtime="openvino", cache_dir=tmp_path / "cache", output=tmp_path / "out")
    with pytest.raises(OptionError, match="Choose one of tvm, onnxruntime, openvino, torch, auto"):
        rewriter.optimize(encoder, runtime="vulkan", cache_dir=tmp_path / "cache", output=tmp_path / "out")
