"""Bad input gets one sentence that says what, where and what to do; no traceback; exit code 2; nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rewriter.cli import main

Arrays = dict[str, np.ndarray]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must be refused; returns its sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        before = sorted(path for path in tmp_path.rglob("*"))
        code = main([str(word) for word in words] + ["--cache-dir", str(tmp_path.parent / f"cache-{tmp_path.name}")])
        captured = capsys.readouterr()
        sentences = [line for line in captured.err.splitlines() if line.startswith("optimize: ")]
        assert code == 2, captured.err
        assert len(sentences) == 1, captured.err
        assert "Traceback" not in captured.err + captured.out
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return sentences[0]

    return run


def write(path: Path, graph: onnx.GraphProto, domain: str = "") -> Path:
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def plain_graph(operator: str = "Relu", domain: str = "") -> onnx.GraphProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    return helper.make_graph([helper.make_node(operator, ["x"], ["y"], domain=domain)], "g", [x], [y])


def test_a_missing_model(refused: Callable[..., str]) -> None:
    assert "missing.onnx" in refused("missing.onnx")


@pytest.mark.parametrize("content", [b"", b"this is not a model", b"\x08\x07\x12\x04"])
def test_a_file_that_is_no_model(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    assert "bad.onnx" in refused("bad.onnx")


def test_a_truncated_model(refused: Callable[..., str], tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "half.onnx").write_bytes(encoder.read_bytes()[: encoder.stat().st_size // 2])
    assert "half.onnx" in refused("half.onnx")


def test_a_model_without_attention(refused: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "plain.onnx", plain_graph())
    assert "no attention" in refused("plain.onnx")


def test_an_operator_nobody_knows(refused: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "odd.onnx", plain_graph("Frobnicate", "com.example"), "com.example")
    sentence = refused("odd.onnx")
    assert "com.example" in sentence or "Frobnicate" in sentence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "abacus"], "abacus"),
        (["--passes", "levitation"], "levitation"),
        (["--max-drop", "lots"], "lots"),
        (["--shape", "input_ids=0x3"], "input_ids=0x3"),
        (["--shape", "nothing=1x3"], "nothing"),
        (["--effort", "heroic"], "heroic"),
        (["--precision", "int3"], "int3"),
        (["--threads", "0"], "threads"),
        (["--max-time", "soon"], "soon"),
        (["--metric", "accuracy"], "--data"),
        (["--config", "missing.json"], "missing.json"),
        (["--frobnicate"], "--frobnicate"),
        ([], "--shape"),
    ],
)
def test_options_that_make_no_sense(refused: Callable[..., str], encoder: Path, words: list[str], said: str) -> None:
    assert said in refused(encoder, *words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "attention_mask"}, "attention_mask"),
        (lambda a: a | {"surplus": a["input_ids"]}, "surplus"),
        (lambda a: a | {"input_ids": a["input_ids"].astype(np.float32) + 0.5}, "float32"),
        (lambda a: a | {"input_ids": a["input_ids"][:, :5]}, "attention_mask"),
        (lambda a: a | {"input_ids": a["input_ids"][:50]}, "samples"),
        (lambda a: {k: v[:8] for k, v in a.items()}, "8 samples"),
        (lambda a: a | {"labels": a["labels"].astype(np.float32)}, "labels"),
    ],
)
def test_data_that_does_not_fit(
    refused: Callable[..., str], tmp_path: Path, encoder: Path, encoder_arrays: Arrays,
    change: Callable[[Arrays], Arrays], said: str,
) -> None:  # fmt: skip
    np.savez(tmp_path / "data.npz", **change(encoder_arrays))
    assert said in refused(encoder, "--data", "data.npz")


def test_pickled_data_is_never_loaded(refused: Callable[..., str], tmp_path: Path, encoder: Path) -> None:
    np.savez(tmp_path / "data.npz", input_ids=np.array([{"a": 1}], dtype=object))
    assert "pickled" in refused(encoder, "--data", "data.npz")


def test_an_unknown_metric(refused: Callable[..., str], encoder: Path, encoder_data: Path) -> None:
    assert "vibes" in refused(encoder, "--data", encoder_data, "--metric", "vibes")


def test_an_output_folder_with_something_else_in_it(refused: Callable[..., str], tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "holds something else" in refused(encoder, "--shape", "input_ids=1x8", "-o", "out")


def test_a_plan_that_is_missing(refused: Callable[..., str], encoder: Path) -> None:
    assert "plan.json" in refused(encoder, "--shape", "input_ids=1x8", "--plan", "plan.json")


def test_a_config_file_gives_options_and_the_command_line_wins(
    refused: Callable[..., str], tmp_path: Path, encoder: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"target": "abacus", "shape": ["input_ids=1x8"]}))
    assert "abacus" in refused(encoder, "--config", "config.json")
    assert "levitation" in refused(encoder, "--config", "config.json", "--target", "cpu", "--passes", "levitation")


def test_inspect_prints_what_there_is(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(encoder)]) == 0
    table = capsys.readouterr().out
    assert "2 attentions, 2 feed-forwards" in table and "layers.0-1.attention" in table and "head_pruning" in table
    assert main(["inspect", "--json", str(encoder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["heads"] for site in found["attention"]] == [4, 4]
    assert found["attention"][0]["rewrites"]["head_pruning"] == "ok"


def test_a_dry_run_writes_nothing(
    encoder: Path,
    encoder_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(encoder), "--data", str(encoder_data), "--dry-run", "--cache-dir", str(tmp_path / "cache")]
    assert main(words) == 0
    assert "calibrated combinations" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_without_arguments_the_usage_is_shown() -> None:
    run = subprocess.run([sys.executable, "-m", "rewriter.cli"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage: optimize" in run.stderr


def test_a_bug_becomes_one_sentence_and_a_file(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rewriter.inspection

    def broken(_: Path) -> None:
        raise RuntimeError("the flux capacitor is empty")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewriter.inspection, "inspect", broken)
    assert main(["inspect", str(encoder)]) == 1
    assert "flux capacitor" in capsys.readouterr().err
    (crash,) = tmp_path.glob("optimize-crash-*.txt")
    assert "RuntimeError" in crash.read_text()
