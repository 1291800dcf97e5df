"""The store survives kills, company, other versions and full disks, and says what it did not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rewriter.core.errors import OutputError
from rewriter.core.store import Store


def test_what_is_kept_is_found_by_another_store(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "costs.jsonl").put({"k": 1, "t": "x"}, {"median": 0.1})
    assert Store(tmp_path / "a" / "costs.jsonl").get({"t": "x", "k": 1}) == {"median": 0.1}
    assert Store(tmp_path / "a" / "costs.jsonl").get({"k": 2}) is None


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    Store(path).put({"k": 1}, {"v": 1})
    with path.open("a") as file:
        file.write('{"key": {"k": 2}, "val')
    Store(path).put({"k": 3}, {"v": 3})
    again = Store(path)
    assert again.get({"k": 1}) == {"v": 1}
    assert again.get({"k": 2}) is None
    assert again.get({"k": 3}) == {"v": 3}


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    code = "import sys, pathlib; from rewriter.core.store import Store\n"
    code += "s = Store(pathlib.Path(sys.argv[1]))\nfor i in range(50): s.put({'who': sys.argv[2], 'i': i}, {'v': i})"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    store = Store(path)
    assert all(store.get({"who": who, "i": i}) == {"v": i} for who in "ab" for i in range(50))


def test_what_was_not_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    Store(path).put({"k": 1}, {"v": 1})
    assert Store(path).note() == ""
    with path.open("ab") as file:
        file.write(
            b'{"format": 99, "key": {"k": 1}, "value": {"v": 9}}\n{"kernel": "gemm", "result": {}}\n\xff\xfe\n[1]\n'
        )
        file.write(b'{"format": 1, "key": {"k": 5}, "val')
    again = Store(path)
    assert again.get({"k": 1}) == {"v": 1}
    assert "3 damaged or cut off, 2 written by another version" in again.note()
    again.put({"k": 5}, {"v": 5})
    assert Store(path).get({"k": 5}) == {"v": 5}


def test_a_reader_follows_a_writer_and_a_shortened_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    reader, writer = Store(path), Store(path)
    writer.put({"k": 1}, {"v": 1})
    assert reader.get({"k": 1}) == {"v": 1}
    first = path.read_bytes()
    writer.put({"k": 1}, {"v": 2})
    assert reader.get({"k": 1}) == {"v": 2} and list(reader.items()) == [({"k": 1}, {"v": 2})]
    path.write_bytes(first)
    assert reader.get({"k": 1}) == {"v": 1}


def test_no_room_is_a_clear_error_that_loses_nothing() -> None:
    with pytest.raises(OutputError, match="cannot write /dev/full"):
        Store(Path("/dev/full")).put({"k": 1}, {"v": 1})
