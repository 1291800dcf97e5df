"""Races with real processes: blocks, feeds in turn, failures, memory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from rewriter.measurement import environment, memory
from rewriter.measurement.bench import Subject, WorkerBench, load_feeds, save_feeds
from rewriter.measurement.race import Rules, race
from rewriter.runtimes.workers import Worker, WorkerFailure

FAKE = "tests.measurement.fake_runtime:FakeRuntime"
ALLOCATE = "tests.runtimes.jobs:allocate"


def subject(name: str, what: str, folder: Path, count: int = 3) -> Subject:
    artifact = folder / name
    artifact.write_text(what)
    feeds = save_feeds([{"x": np.array([index], np.int64)} for index in range(count)], folder / "feeds")
    return Subject(name, FAKE, artifact, feeds)


def test_feeds_are_saved_and_read_back(tmp_path: Path) -> None:
    batch = {"a": np.arange(6).reshape(2, 3), "b": np.array([True])}
    (path,) = save_feeds([batch], tmp_path / "new")
    for name, array in load_feeds(path).items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype


def test_a_block_uses_the_feeds_in_turn(tmp_path: Path) -> None:
    made = subject("one", "add", tmp_path)
    bench = WorkerBench(made, threads=1, cores=(), timeout_s=60.0)
    try:
        assert bench.open() is None
        first, second = bench.block(2, 0), bench.block(3, 1)
        assert bench.peak_bytes() is not None
    finally:
        bench.close()
    assert not isinstance(first, WorkerFailure) and not isinstance(second, WorkerFailure)
    assert (len(first.runs_s), len(second.runs_s)) == (2, 3) and min(*first.runs_s, *second.runs_s) > 0
    assert 0 <= first.preempted <= 2
    # Opening runs each once, then the blocks go on where the last one stopped, the warm-up run included.
    assert (tmp_path / "one.seen").read_text().split() == list("012" + "01" + "2012")


def test_a_real_race_with_one_that_dies(tmp_path: Path) -> None:
    subjects = [subject("base", "add", tmp_path), subject("dying", "die", tmp_path), subject("new", "add", tmp_path)]
    result = race(subjects, rules=Rules(least_rounds=6, most_rounds=6, block_s=0.005, most_runs=20))
    assert set(result) == {"base", "new"}
    assert (result.failures["dying"].kind, result.failures["dying"].exit_code) == ("crash", 9)
    assert len(result["new"].blocks_s) == 6
    assert result["new"].environment["threads"] == "1"
    assert set(result.peak_bytes) == {"base", "new"} and min(result.peak_bytes.values()) > 1 << 20


def test_a_process_that_somebody_kills_is_started_again_and_loses_nothing(tmp_path: Path) -> None:
    subjects = [
        subject("base", "add", tmp_path),
        subject("hit", "falter", tmp_path),
        subject("oom", "doomed", tmp_path),
    ]
    result = race(subjects, rules=Rules(least_rounds=6, most_rounds=6, block_s=0.001, most_runs=2, reopen_every=0))
    assert set(result) == {"base", "hit"} and len(result["hit"].blocks_s) == 6
    assert (result.failures["oom"].kind, result.failures["oom"].exit_code) == ("crash", -9)
    told = "\n".join(result.retries)
    assert "hit: crash: hit ended during a call by SIGKILL" in told and "tried once more and succeeded" in told
    assert "oom: crash" in told and "tried once more and failed again" in told


def test_a_process_killed_between_two_blocks(tmp_path: Path) -> None:
    bench = WorkerBench(subject("one", "add", tmp_path), threads=1, cores=(), timeout_s=60.0)
    try:
        assert bench.open() is None
        assert bench._worker.pid is not None
        os.kill(bench._worker.pid, signal.SIGKILL)
        while bench._worker.pid is not None:
            time.sleep(0.01)
        block = bench.block(2, 0)
    finally:
        bench.close()
    assert not isinstance(block, WorkerFailure) and len(block.runs_s) == 2 and block.restarts == 1


def test_an_artifact_that_is_not_there(tmp_path: Path) -> None:
    lost = Subject("lost", FAKE, tmp_path / "nothing", ())
    result = race([lost], rules=Rules())
    assert result.failures["lost"].kind == "error" and "FileNotFoundError" in result.failures["lost"].detail


def test_peak_memory_follows_what_the_worker_holds() -> None:
    with Worker("memory", 1) as worker:
        before = memory.peak_resident_bytes(worker)
        worker.call(ALLOCATE, 128 << 20)
        after = memory.peak_resident_bytes(worker)
        assert isinstance(before, int) and isinstance(after, int)
        assert after - before > 100 << 20
        if memory.forget_peak(worker):
            reset = memory.peak_resident_bytes(worker)
            assert isinstance(reset, int) and reset < after - (64 << 20)


def test_environment_says_what_it_can() -> None:
    found = environment.describe(2, (0, 1))
    assert found["threads"] == "2" and found["pinned_to_cores"] == "0,1"
    assert found["version onnxruntime"] and found["processor"]
    assert all(isinstance(value, str) for value in found.values())


def test_pinnable_cores() -> None:
    assert environment.pinnable(0) == () and environment.pinnable(100_000) == ()
    assert len(environment.pinnable(1)) <= 1
