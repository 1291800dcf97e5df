"""``make quality`` on the smallest of its models, and its page from recorded points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models import digits_vit, smollm2
from models.quality import __main__ as command
from models.quality.digits import digits
from models.quality.methods import BASELINES, MIX
from models.quality.page import table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_vit, "EPOCHS", 14)
        digits(found / "digits")
    return found


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict:
    monkeypatch.setattr("sys.argv", ["quality", "digits", "-o", str(folder), "--shares", "0.6", *words])
    assert command.main() == 0
    return json.loads((folder / "digits.json").read_text())


def test_cuts_cost_little_dropping_much_and_a_second_run_measures_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = run(folder, monkeypatch)
    points = known["points"]
    assert known["original"] > 0.8
    assert points[f"{MIX}@0.6"]["share"] <= 0.6 + 1e-9
    assert points[f"{MIX}@0.6"]["drop"] < 2.0 < 10.0 < points["late attention dropped@0.6"]["drop"]
    assert (folder / "digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (MIX, "ffn_pruning", *BASELINES))
    monkeypatch.setattr(command, "_point", lambda *_: pytest.fail("measured again"))
    assert run(folder, monkeypatch)["points"] == points


def test_table_says_where_a_method_does_not_get_that_far() -> None:
    known = {
        "model": "m", "metric": "accuracy, %", "unit": "points", "original": 0.9,
        "points": {"a@0.8": {"share": 0.8, "drop": 0.5}, "a@0.5": {"share": 0.64, "drop": 12.0}, "b@0.5": None},
    }  # fmt: skip
    lines = table(known).splitlines()
    assert "90.00 in the original" in lines[0]
    assert lines[2:] == ["| | 80% | 50% |", "| --- | --- | --- |", "| a | 0.50 | 12.00 at 64% |", "| b | – | – |"]


def test_rows_of_a_head_are_put_back_into_halves() -> None:
    halves = np.arange(12.0)[:, None]
    pairs = np.concatenate([halves[:6].reshape(2, 3).T.reshape(-1), halves[6:].reshape(2, 3).T.reshape(-1)])[:, None]
    np.testing.assert_array_equal(smollm2._halves(pairs, 2), halves)
