"""The table of works: what it says of goals, and that records are kept and used again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewriter.benchmark import works_command
from rewriter.benchmark.entrants import INDUCTOR, ONNXRUNTIME_FP32, OPENVINO_FP32, ours
from rewriter.benchmark.material import _fitted
from rewriter.benchmark.work_race import WorkRaces, code_fingerprint
from rewriter.benchmark.work_table import Record, table, verdict
from rewriter.benchmark.works import FASTEST, WORKS, Goal, Work
from rewriter.core.errors import ModelError, OptionError

OTHER = Work("minilm", (1, 16), "fp32")


def interval(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}


def record(times_s: dict[str, float], refused: dict[str, str] | None = None) -> Record:
    own = times_s.get(ours("fp32"), 1.0)
    return {
        "work": OTHER.name,
        "threads": 1,
        "code": "here",
        "latency_s": {name: interval(time_s) for name, time_s in times_s.items()},
        "ratios": {name: interval(time_s / own) for name, time_s in times_s.items() if name != ours("fp32")},
        "rounds": 9,
        "refused": refused or {},
        "environment": {"processor": "one"},
    }


@pytest.mark.parametrize(("median", "said"), [(1.32, "yes"), (1.28, "no"), (1.301, "unsure")])
def test_a_goal_is_reached_only_where_the_whole_interval_says_so(median: float, said: str) -> None:
    assert verdict(interval(median), Goal(FASTEST, 1.3)) == said


def test_the_fastest_peer_is_the_one_compared_with() -> None:
    found = record({ours("fp32"): 0.010, ONNXRUNTIME_FP32: 0.020, OPENVINO_FP32: 0.015})
    row = next(line for line in table([(OTHER, found)], "here").splitlines() if line.startswith(f"| {OTHER.name}"))
    assert f"{OPENVINO_FP32} (fastest)" in row and "1.50x" in row and row.endswith("| yes |")


def test_who_took_no_part_is_named_and_nothing_is_claimed() -> None:
    found = record({ONNXRUNTIME_FP32: 0.02}, {ours("fp32"): "crash: gone | away", INDUCTOR: "no-compiler: none"})
    drawn = table([(OTHER, found)], "elsewhere")
    assert "unknown" in drawn and f"{INDUCTOR} took no part" in drawn and "other sources" in drawn
    assert "gone \\| away" in drawn


def test_every_work_of_the_issue_is_there() -> None:
    names = {work.name for work in WORKS}
    assert len(names) == len(WORKS) == 18
    assert {f"{work.model}-{work.shape}" for work in WORKS} == {
        "minilm-1x128", "minilm-1x16", "minilm-1x512", "minilm-8x128", "decoder-1x512", "vit-1x3x224x224",
    }  # fmt: skip
    for work in WORKS:
        entrants = [entrant.name for entrant in work.entrants]
        assert entrants[0] == ours(work.precision) not in work.peers
        assert all(goal.against in (*entrants, FASTEST) for goal in work.goals)


def test_a_record_is_not_made_twice(tmp_path: Path) -> None:
    races = WorkRaces(tmp_path / "no models", tmp_path, 1.0, lambda line: None)
    assert races.record(OTHER, 1) is None
    (tmp_path / f"{OTHER.name}@1.json").write_text(json.dumps({"rounds": 3}))
    races.run(OTHER, (1,))  # there is no model, so anything but the record would raise
    assert races.record(OTHER, 1) == {"rounds": 3}
    with pytest.raises(ModelError, match="does not exist"):
        races.run(OTHER, (1, 2))


def test_texts_are_cut_or_repeated() -> None:
    rows = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(_fitted(rows, (2, 2)), [[0, 1], [3, 4]])
    np.testing.assert_array_equal(_fitted(rows, (2, 5)), [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]])


def test_the_command_names_works_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert works_command.main(["--list", "--work", "vit"]) == 0
    assert capsys.readouterr().out.split() == [f"vit-1x3x224x224-{name}" for name in ("fp32", "bf16", "int8")]
    with pytest.raises(OptionError, match="no work"):
        works_command.main(["--work", "nothing"])
    with pytest.raises(OptionError, match="no list"):
        works_command.main(["--threads", "0", "--results", str(tmp_path)])
    assert code_fingerprint() == code_fingerprint()
