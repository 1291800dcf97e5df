from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.core.errors import OutputError
from rewriter.report.output import check_output, check_room, writing


def ours(folder: Path) -> None:
    folder.mkdir()
    (folder / "report.json").write_text('{"variants_timed": 1}')


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    with writing(tmp_path / "a" / "out") as scratch:
        (scratch / "model.onnx").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "model.onnx").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path: Path, error: type[BaseException]) -> None:
    ours(tmp_path / "out")
    with pytest.raises(error), writing(tmp_path / "out") as scratch:
        (scratch / "model.onnx").write_text("half")
        raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "report.json"]


def test_our_own_folder_is_replaced(tmp_path: Path) -> None:
    ours(tmp_path / "out")
    with writing(tmp_path / "out") as scratch:
        (scratch / "new").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="holds something else"):
        check_output(tmp_path / "out")
    with pytest.raises(OutputError), writing(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "out")


def test_no_room_is_one_sentence(tmp_path: Path) -> None:
    check_room(tmp_path / "out", 1)
    with pytest.raises(OutputError, match="no room for the result"):
        check_room(tmp_path / "out", 10**18)
