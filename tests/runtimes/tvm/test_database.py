"""The database survives kills, company, damage, other versions and full disks."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from rewriter.core.errors import OutputError
from rewriter.runtimes.tvm.database import Subject, TuningDatabase
from tests.runtimes.tvm.database_writer import write_many, write_until_full
from tests.runtimes.tvm.harness import target

SUBJECT = Subject.of("gemm::0", (4, 32, 8), target())


def test_a_record_is_found_by_another_reader(tmp_path: Path) -> None:
    writer, reader = TuningDatabase(tmp_path / "t.jsonl"), TuningDatabase(tmp_path / "t.jsonl")
    assert reader.find(SUBJECT) is None
    writer.add(SUBJECT, {"seconds": 1.0})
    writer.add(SUBJECT, {"seconds": 2.0})
    assert reader.find(SUBJECT) == {"seconds": 2.0}


@pytest.mark.parametrize(
    "other",
    [
        Subject.of("gemm::0", (4, 32, 9), target()),
        Subject.of("gemm::0", (4, 32, 8), target(2)),
        Subject.of("gemm:gelu:0", (4, 32, 8), target()),
        Subject.of("gemm::0", (4, 32, 8), target(), "bf16"),
        Subject.of("gemm::0", (4, 32, 8), target(), source="another version of the template"),
        replace(SUBJECT, tvm="0.0"),
    ],
)
def test_what_differs_in_anything_is_another_subject(tmp_path: Path, other: Subject) -> None:
    database = TuningDatabase(tmp_path / "t.jsonl")
    database.add(SUBJECT, {"seconds": 1.0})
    assert database.find(other) is None


def test_failures_and_ratios_are_kept_beside_results(tmp_path: Path) -> None:
    TuningDatabase(tmp_path / "t.jsonl").add_failure(SUBJECT, "a", "crash: SIGSEGV")
    TuningDatabase(tmp_path / "t.jsonl").add_measured(SUBJECT, "b", 1.5)
    database = TuningDatabase(tmp_path / "t.jsonl")
    assert database.find(SUBJECT) is None
    assert database.failure(SUBJECT, "a") == "crash: SIGSEGV" and database.failure(SUBJECT, "b") == ""
    assert database.measured(SUBJECT, "b") == 1.5 and database.measured(SUBJECT, "c") == 1.0


@pytest.mark.parametrize("torn", [b'{"kernel": "gemm::0", "sha', b"\xff\x00\n", b"[1, 2]\n", b'{"kernel": 3}'])
def test_torn_lines_cost_only_themselves(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "t.jsonl"
    TuningDatabase(path).add(SUBJECT, {"seconds": 1.0})
    with path.open("ab") as file:
        file.write(torn)
    other = Subject.of("gemm::1", (1, 1, 1), target())
    TuningDatabase(path).add(other, {"seconds": 3.0})
    database = TuningDatabase(path)
    assert database.find(SUBJECT) == {"seconds": 1.0} and database.find(other) == {"seconds": 3.0}


@pytest.mark.parametrize("keep", [1, 40, 150])
def test_a_file_cut_off_anywhere_keeps_its_whole_lines(tmp_path: Path, keep: int) -> None:
    path, other = tmp_path / "t.jsonl", Subject.of("gemm::1", (1, 1, 1), target())
    TuningDatabase(path).add(SUBJECT, {"seconds": 1.0})
    whole = path.stat().st_size
    TuningDatabase(path).add(other, {"seconds": 2.0})
    with path.open("r+b") as file:
        file.truncate(whole + keep)
    database = TuningDatabase(path)
    assert database.find(SUBJECT) == {"seconds": 1.0} and database.find(other) is None
    assert "1 damaged or cut off" in database.store.note()
    database.add(other, {"seconds": 3.0})
    assert TuningDatabase(path).find(other) == {"seconds": 3.0}


def test_lines_of_another_version_are_counted_and_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"format": 99, "key": SUBJECT.as_dict(), "value": {"seconds": 0.0}}) + "\n")
    database = TuningDatabase(path)
    assert database.find(SUBJECT) is None and "1 written by another version" in database.store.note()
    database.add(SUBJECT, {"seconds": 1.0})
    assert TuningDatabase(path).find(SUBJECT) == {"seconds": 1.0}


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path, context = tmp_path / "t.jsonl", multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(path, name)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    database = TuningDatabase(path)
    for name in ("a", "b"):
        for size in range(50):
            found = database.find(Subject(name, (size,), "float32", "t", "v"))
            assert found is not None and found["seconds"] == size


def test_a_killed_process_keeps_what_it_wrote(tmp_path: Path) -> None:
    path, context = tmp_path / "t.jsonl", multiprocessing.get_context("spawn")
    worker = context.Process(target=write_many, args=(path, "a", 100_000))
    worker.start()
    while not path.exists() or path.stat().st_size < 20_000:
        assert worker.is_alive()
    worker.kill()
    worker.join()
    whole = path.read_bytes().count(b"\n")
    database = TuningDatabase(path)
    assert all(database.find(Subject("a", (size,), "float32", "t", "v")) for size in range(whole)) and whole > 10


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        TuningDatabase(tmp_path / "file" / "t.jsonl").add(SUBJECT, {})


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk: the write is cut off in the middle of a line."""
    path, context = tmp_path / "t.jsonl", multiprocessing.get_context("spawn")
    worker = context.Process(target=write_until_full, args=(path, 5000))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    database = TuningDatabase(path)
    found = [database.find(Subject("full", (size,), "float32", "t", "v")) for size in range(9)]
    assert all(found[:7]) and not any(found[7:])
    database.add(SUBJECT, {"seconds": 1.0})
    assert TuningDatabase(path).find(SUBJECT) == {"seconds": 1.0}
