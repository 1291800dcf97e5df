"""A device behind an RPC tracker, with real processes on loopback: lent, used, lost, found again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install tornado)")

from rewriter.core.errors import DeviceError
from rewriter.core.measurement import Decision, decide, speedup
from rewriter.measurement.bench import Subject, WorkerBench, save_feeds
from rewriter.measurement.race import RaceResult, Rules, race
from rewriter.runtimes.base import stopwatch
from rewriter.runtimes.tvm import remote
from rewriter.runtimes.tvm.artifact import CODE, MANIFEST, file_sha256
from rewriter.runtimes.tvm.remote import RemoteExecutable, TvmRemote
from rewriter.runtimes.workers import Worker
from tests.runtimes.tvm import graphs
from tests.runtimes.tvm.harness import run_reference, target
from tests.runtimes.tvm.rpc_processes import KEY, Devices, devices

SPEC = "rewriter.runtimes.tvm.remote:TvmRemote"
FEEDS = graphs.feeds(1, 7)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    with devices(tmp_path_factory.mktemp("rpc")) as made:
        made.serve()
        yield made


@pytest.fixture(scope="module")
def artifacts(board: Devices, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [built(board, tmp_path_factory.mktemp("built"), seed) for seed in (0, 1)]


def pair(artifacts: list[Path], folder: Path, spec: str = SPEC) -> list[Subject]:
    paths = save_feeds([FEEDS], folder / "feeds")
    return [Subject(name, spec, artifact, paths) for name, artifact in zip("ab", artifacts, strict=True)]


def built(board: Devices, folder: Path, seed: int = 0) -> Path:
    lent = replace(target(), remote=f"{board.address}/{KEY}")
    shapes = {name: array.shape for name, array in FEEDS.items()}
    return TvmRemote().build(graphs.encoder(seed), shapes, folder, lent)


def test_it_runs_and_is_timed_there(artifacts: list[Path]) -> None:
    executable = TvmRemote().load(artifacts[0], 1)
    got = executable.run(FEEDS)
    for name, wanted in run_reference(graphs.encoder(), FEEDS).items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5)
    timed = stopwatch(executable, FEEDS)
    assert all(0 < timed() < 1 for _ in range(3)) and executable.reconnections == 0


def test_subjects_of_a_race_share_the_device(board: Devices, artifacts: list[Path], tmp_path: Path) -> None:
    subjects = pair(artifacts, tmp_path)
    rules = Rules(least_rounds=2, most_rounds=3, reopen_every=2, block_s=0.002)
    with Worker("device", 1) as shared:
        found = race(subjects, rules=rules, open_bench=lambda one: WorkerBench(one, 1, (), 60.0, shared))
    assert set(found) == {"a", "b"} and not found.failures and not found.peak_bytes


def test_a_lost_device_is_a_clear_error_and_one_that_comes_back_costs_nothing(
    board: Devices, artifacts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETURN_S", 0.5)
    executable = TvmRemote().load(artifacts[0], 1)
    timed = stopwatch(executable, FEEDS)
    before = [timed() for _ in range(3)]
    board.lose()
    with pytest.raises(DeviceError, match="finished measurements are kept"):
        timed()
    board.serve()
    after = [timed() for _ in range(3)]
    assert len(before + after) == 6 and isinstance(executable, RemoteExecutable) and executable.reconnections == 1


def test_an_unknown_key_or_tracker_is_a_clear_error(board: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHECK_S", 0.1)
    with pytest.raises(DeviceError, match="knows no device 'toaster'"):
        remote.check(f"{board.address}/toaster")
    with pytest.raises(DeviceError, match="Start the tracker"):
        remote.check(f"127.0.0.1:1/{KEY}")


def race_there(subjects: list[Subject], rules: Rules, during: Callable[[int], None]) -> RaceResult:
    """A race in one shared process; `during` is told after every round."""
    with Worker("device", 1) as shared:
        return race(
            subjects,
            rules=rules,
            progress=lambda state: during(state.round),
            open_bench=lambda one: WorkerBench(one, 1, (), 60.0, shared),
        )


def test_a_race_outlives_a_device_that_comes_back(board: Devices, artifacts: list[Path], tmp_path: Path) -> None:
    subjects = pair(artifacts, tmp_path)

    def flicker(number: int) -> None:
        if number == 2:
            board.lose()
            board.serve()

    rules = Rules(least_rounds=6, most_rounds=6, reopen_every=0, block_s=0.002)
    found = race_there(subjects, rules, flicker)
    assert not found.failures and [len(one.blocks_s) for one in found.values()] == [6, 6]
    assert sum(int(one.environment.get("device_reconnections", 0)) for one in found.values()) >= 1


def test_a_race_keeps_what_it_has_when_the_device_stays_away(
    board: Devices, artifacts: list[Path], tmp_path: Path
) -> None:
    subjects = pair(artifacts, tmp_path, "tests.runtimes.tvm.impatient:Impatient")
    rules = Rules(least_rounds=20, most_rounds=20, reopen_every=0, block_s=0.002)
    found = race_there(subjects, rules, lambda number: board.lose() if number == 3 else None)
    board.serve()
    assert found.stopped == "device lost" and not found.failures
    assert [len(one.blocks_s) for one in found.values()] == [3, 3]
    assert decide(speedup(found["a"], found["b"])) is Decision.INCONCLUSIVE
    assert any("tried once more and failed again" in line for line in found.retries)
    assert any("3 rounds before that were kept" in line for line in found.retries)


def test_a_candidate_that_crashes_the_device_is_named_and_the_others_race_on(
    board: Devices, artifacts: list[Path], tmp_path: Path
) -> None:
    subjects = pair(artifacts, tmp_path)
    crashing = shutil.copytree(artifacts[0], tmp_path / "crashing")
    source = tmp_path / "crash.c"
    source.write_text("__attribute__((constructor)) static void fall(void) { *(volatile int *)0 = 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", crashing / CODE, source], check=True)
    manifest = json.loads((crashing / MANIFEST).read_text())
    manifest["sha256"][CODE] = file_sha256(crashing / CODE)
    (crashing / MANIFEST).write_text(json.dumps(manifest))
    subjects.insert(1, replace(subjects[0], name="crashing", artifact=crashing))
    with board.kept_up():
        rules = Rules(least_rounds=3, most_rounds=3, reopen_every=0, block_s=0.002)
        found = race_there(subjects, rules, lambda _: None)
    assert set(found) == {"a", "b"}, (found.failures, found.retries)
    assert [len(one.blocks_s) for one in found.values()] == [3, 3]
    assert found.failures["crashing"].kind == "crash" and "failed 3 times in a row" in found.failures["crashing"].detail
