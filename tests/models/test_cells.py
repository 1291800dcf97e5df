"""Cells, packs and the summary: what is written is what is read, and what goes wrong is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import cells
from models.cells import Cell, make, record_failure
from models.export import export
from models.families import FAMILIES
from models.fixtures import Pack, meaning, read_pack, write_pack
from models.matrix import main
from models.rivals import Verdict, judge
from models.summary import Row, text

CELL = Cell("packed_chunk", "eager", "l17")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("matrix")
    make(CELL, where)
    return where


def test_packs_keep_structure_and_draw_weights(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(CELL.path(folder))
    write_pack(tmp_path / "one.tar.xz", Pack({"a": model}, {"b": "a"}, {"c": "no"}))
    write_pack(tmp_path / "two.tar.xz", Pack({"a": model}, {"b": "a"}, {"c": "no"}))
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    pack = read_pack(tmp_path / "one.tar.xz")
    assert (pack.same, pack.failed) == ({"b": "a"}, {"c": "no"})
    assert meaning(pack.models["a"]) == meaning(model)
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, pack.models["a"]))
    assert {name: array.shape for name, array in before.items()} == {name: array.shape for name, array in after.items()}
    large = [name for name, array in before.items() if array.size > 256]
    assert large and all(np.abs(after[name] - before[name]).max() > 0.1 for name in large)


def test_meaning_is_told_apart(folder: Path) -> None:
    model = onnx.load(CELL.path(folder))
    said = meaning(model)
    model.opset_import[0].version = 16  # LayerNormalization aside, nothing here changed
    model.graph.node[0].name = "another name"
    assert meaning(model) == said
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 1
    assert meaning(model) != said
    model.opset_import[0].version = 12  # a softmax of another kind
    assert meaning(model) != said


def test_what_an_exporter_says_is_kept_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("bert", "eager", "x99")
    make(cell, tmp_path)
    assert cell.failure(tmp_path).startswith("ValueError: unknown variant 'x99'")
    monkeypatch.setattr("models.export.export", None)
    make(cell, tmp_path)
    record_failure(cell, tmp_path, "\x1b[96mTrouble\x1b[0m\nadvice\nKeyError: cause\n")
    assert cell.failure(tmp_path) == "Trouble KeyError: cause"
    assert cells.family_of(cell) is FAMILIES["bert"]


def test_converted_graphs_are_half(folder: Path, tmp_path: Path) -> None:
    for variant, kind in (("l17c", onnx.TensorProto.FLOAT16), ("l17k", onnx.TensorProto.FLOAT)):
        cell = Cell(CELL.family, CELL.form, variant)
        make(cell, folder)
        model = onnx.load(cell.path(folder))
        assert model.graph.input[0].type.tensor_type.elem_type == kind
        assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    export(partial(FAMILIES[CELL.family].build, "eager"), "l17h", tmp_path / "half.onnx")
    assert onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_wrong_rival_is_called_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(path: Path, cell: Cell) -> onnx.ModelProto:
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
        weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
        return model

    counts = iter((0, 1, 0))
    monkeypatch.setattr("models.rivals.by_optimizer", spoil)
    monkeypatch.setattr("models.rivals._fused", lambda model: next(counts))
    assert judge("optimizer", CELL, CELL.path(folder)).kind == "wrong"

    def fail(path: Path) -> onnx.ModelProto:
        raise RuntimeError("no")

    monkeypatch.setattr("models.rivals.by_onnxscript", fail)
    assert judge("onnxscript", CELL, CELL.path(folder)) == Verdict(0, "failed", "RuntimeError: no")


def test_the_summary_counts() -> None:
    family, negative = FAMILIES["bert"], FAMILIES["linear_attention"]
    states = {"found": 2, "mapped": 2, "lowerable": 1}
    verdicts = {"optimizer": Verdict(2, "wrong", "1"), "onnxscript": Verdict(2, "right")}
    rows = [
        Row(Cell("bert", "eager", "l17"), family, states, verdicts),
        Row(Cell("bert", "sdpa", "l17"), family, failure="KeyError: why"),
        Row(Cell("linear_attention", "eager", "d18"), negative, dict.fromkeys(states, 1), verdicts),
    ]
    lines = text(rows).splitlines()
    assert lines[2] == "| TorchScript 17 | eager | 1 | 2 | 2 | 2 | 1 | 0 | 0 (2 wrong) | 2 |"
    assert lines[3].startswith("| all | not to be taken for attention | 1 | 0 | 0 | 0 | 0 | 1 |")
    assert "- `bert.sdpa.l17`: KeyError: why" in lines


def test_the_command_exports_recognises_and_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-o", str(tmp_path / "kept"), "--families", "packed_chunk", "--variants", "l17", "--ours"]
    assert main([*arguments, "--pack", str(tmp_path / "packs"), "--summary", str(tmp_path / "summary.md")]) == 0
    assert "packed_chunk.eager.l17 | 1 | 1 | 1 | 1" in capsys.readouterr().out
    assert sorted(read_pack(tmp_path / "packs" / "l17.tar.xz").models) == [
        "packed_chunk.eager.l17",
        "packed_chunk.sdpa.l17",
    ]
    assert "TorchScript 17" in (tmp_path / "summary.md").read_text()
