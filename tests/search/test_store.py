from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rewriter.search.store import Store


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
    code = "import sys, pathlib; from rewriter.search.store import Store\n"
    code += "s = Store(pathlib.Path(sys.argv[1]))\nfor i in range(50): s.put({'who': sys.argv[2], 'i': i}, {'v': i})"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    store = Store(path)
    assert all(store.get({"who": who, "i": i}) == {"v": i} for who in "ab" for i in range(50))
