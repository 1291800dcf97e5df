"""The whole product on a tiny encoder: search with data, replay, verify, load elsewhere, interrupt."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest

import rewriter
from rewriter.cli import main
from rewriter.search import run as search_run

SCHEMA = json.loads((Path(rewriter.__file__).parent / "report" / "schema.json").read_text())


@pytest.fixture(scope="module")
def optimised(encoder: Path, encoder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by a quick run with a generous budget."""
    place = tmp_path_factory.mktemp("optimised")
    words = [encoder, "--target", "llvm", "--data", encoder_data, "--max-drop", "20%", "--effort", "quick"]
    words += ["-o", place / "out", "--cache-dir", place / "cache"]
    assert main([str(word) for word in words]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def report(optimised: Path) -> dict:
    return json.loads((optimised / "report.json").read_text())


def run_onnx(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def samples(arrays: dict[str, np.ndarray], count: int, length: int | None = None) -> dict[str, np.ndarray]:
    return {name: arrays[name][:count, :length] for name in ("input_ids", "attention_mask")}


def test_the_report_fits_its_schema(report: dict) -> None:
    jsonschema.validate(report, SCHEMA)
    assert report["variants_timed"] > 10
    assert report["metric"]["name"] == "cosine"
    assert report["task"] is None or report["task"]["name"] == "accuracy"
    assert {site["id"] for site in report["sites"]} == {
        f"layers.{i}.{kind}" for i in range(2) for kind in ("attention", "feed_forward")
    }


def test_the_onnx_file_is_standard_and_keeps_the_interface(optimised: Path, encoder: Path) -> None:
    model, original = onnx.load(optimised / "model.onnx"), onnx.load(encoder)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [i.name for i in model.graph.input] == [i.name for i in original.graph.input]
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_param
    assert {entry.key for entry in model.metadata_props} >= {"rewriter.plan", "rewriter.source"}
    opset = {entry.domain: entry.version for entry in model.opset_import}
    assert opset[""] == next(entry.version for entry in original.opset_import if not entry.domain)


def test_config_and_tokenizer_travel_along(optimised: Path) -> None:
    assert (optimised / "config.json").exists()
    assert (optimised / "vocab.txt").exists()
    assert "finals" in (optimised / "optimize.log").read_text()
    assert (optimised / "report.md").read_text().startswith("# ")


def test_outputs_stay_close_in_both_artifacts(
    optimised: Path, report: dict, encoder: Path, encoder_arrays: dict[str, np.ndarray]
) -> None:
    feeds = samples(encoder_arrays, 8)
    wanted, found = run_onnx(encoder, feeds), run_onnx(optimised / "model.onnx", feeds)
    cosine = (wanted * found).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(found, axis=1)
    assert 1.0 - cosine.mean() < 0.3
    model = rewriter.load(optimised)
    for row in range(8):
        one = {name: array[row : row + 1] for name, array in feeds.items()}
        np.testing.assert_allclose(model(**one)["output"][0], found[row], atol=2e-4)


def test_shorter_inputs_are_padded_to_a_bucket(
    optimised: Path, report: dict, encoder_arrays: dict[str, np.ndarray]
) -> None:
    feeds = samples(encoder_arrays, 1, 5)
    np.testing.assert_allclose(
        rewriter.load(optimised)(**feeds)["output"], run_onnx(optimised / "model.onnx", feeds), atol=2e-4
    )


def test_what_does_not_fit_is_refused(optimised: Path, encoder_arrays: dict[str, np.ndarray]) -> None:
    feeds = {name: np.repeat(array, 9, axis=1) for name, array in samples(encoder_arrays, 1).items()}
    with pytest.raises(rewriter.UserError, match="largest"):
        rewriter.load(optimised)(**feeds)


def test_another_process_can_load_it(optimised: Path) -> None:
    code = (
        "import sys, numpy as np, rewriter\n"
        "model = rewriter.load(sys.argv[1])\n"
        "ids = np.full((1, 16), 7); print(model(input_ids=ids, attention_mask=np.ones_like(ids))['output'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(optimised)], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 24)", done.stderr


def test_a_changed_library_is_not_loaded(optimised: Path, tmp_path: Path) -> None:
    shutil.copytree(optimised, tmp_path / "out")
    with (tmp_path / "out" / "model.so").open("ab") as file:
        file.write(b"x")
    with pytest.raises(rewriter.UserError):
        rewriter.load(tmp_path / "out")


def test_the_plan_rebuilds_the_same_graph_without_data(
    optimised: Path, report: dict, encoder: Path, tmp_path: Path
) -> None:
    words = [encoder, "--plan", optimised / "plan.json", "--shape", "input_ids=1x16", "--effort", "quick"]
    words += ["-o", tmp_path / "again", "--cache-dir", tmp_path / "cache"]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (optimised / "model.onnx").read_bytes()


def test_a_second_search_assembles_and_prices_nothing(
    optimised: Path, report: dict, encoder: Path, encoder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("assemble", "price_options"):
        monkeypatch.setattr(search_run, name, lambda *_, **__: pytest.fail("computed again"))
    words = [encoder, "--target", "llvm", "--data", encoder_data, "--max-drop", "20%", "--effort", "quick"]
    words += ["-o", tmp_path / "again", "--cache-dir", optimised.parent / "cache"]
    assert main([str(word) for word in words]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert any("results of earlier runs" in note for note in again["notes"])
    assert not any("results of earlier runs" in note for note in report["notes"])


def test_verify_agrees(optimised: Path, encoder: Path, encoder_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(optimised), "--against", str(encoder), "--data", str(encoder_data)]) == 0
    assert "ok" in capsys.readouterr().out


def test_verify_sees_another_model(optimised: Path, encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(optimised, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    report["model"]["fingerprint"] = "0" * 64
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    assert main(["verify", str(tmp_path / "out"), "--against", str(encoder)]) == 3


def test_without_data_only_exact_rewrites_are_considered(encoder: Path, tmp_path: Path) -> None:
    words = [encoder, "--shape", "input_ids=1x16", "--effort", "quick", "-o", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--cache-dir", tmp_path / "cache"]]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["metric"] is None
    assert all(option.startswith("exact_cleanup") for option in report["best"]["plan"])
    assert any("no data was given" in note for note in report["notes"])


def test_an_interrupted_run_writes_the_best_so_far(encoder: Path, encoder_data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rewriter.cli", encoder, "--data", encoder_data, "-o", tmp_path / "out"]
    words += ["--cache-dir", tmp_path / "cache", "--effort", "thorough"]
    run = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith("statistics"):
            break
    run.send_signal(signal.SIGINT)
    output = run.stderr.read()
    assert run.wait(timeout=120) == 130, output
    assert "Traceback" not in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interrupted"] is True
    assert (tmp_path / "out" / "model.onnx").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_killed_run_leaves_no_half_written_folder(encoder: Path, encoder_data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rewriter.cli", encoder, "--data", encoder_data, "-o", tmp_path / "out"]
    words += ["--cache-dir", tmp_path / "cache"]
    run = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith("exact"):
            break
    time.sleep(3)
    run.kill()
    run.wait()
    assert not (tmp_path / "out").exists()


def test_scan_says_where_the_time_goes(encoder: Path, tmp_path: Path) -> None:
    from rewriter.core.options import Options
    from rewriter.report.tables import scan_table
    from rewriter.scanning import scan

    found = scan(encoder, Options(shapes={"input_ids": (1, 16)}, cache_dir=tmp_path / "cache"))
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1.0, abs=0.5)
    assert {row["rewrite"] for row in found["gains"]} >= {"everything in attention", "head_pruning", "ffn_pruning"}
    assert all(row["at_most"] >= 1.0 for row in found["gains"])
    assert found["advice"] in scan_table(found)


def test_the_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    from rewriter.doctor import examine
    from rewriter.report.tables import doctor_table

    found = examine(tmp_path / "cache")
    assert found["ok"], doctor_table(found)
    assert {check["check"] for check in found["checks"]} >= {"python", "packages", "tvm", "worker", "cache"}


def test_the_python_interface_does_the_same(encoder: Path, tmp_path: Path) -> None:
    result = rewriter.optimize(
        encoder, shapes={"input_ids": (1, 16)}, effort="quick", cache_dir=tmp_path / "cache", output=tmp_path / "out"
    )
    assert result.report["metric"] is None
    assert result.save(tmp_path / "copy") == tmp_path / "copy"
    assert (tmp_path / "copy" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    assert len(rewriter.inspect(encoder)["attention"]) == 2


def test_onnx_runtime_can_be_what_decides(encoder: Path, tmp_path: Path) -> None:
    words = [encoder, "--shape", "input_ids=1x16", "--runtime", "onnxruntime", "-o", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--cache-dir", tmp_path / "cache", "--effort", "quick"]]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["baseline"]["runtime"] == "onnxruntime"
    assert report["best"]["runtime"] == "onnxruntime"
