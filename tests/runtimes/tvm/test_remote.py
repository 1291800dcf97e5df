"""A device behind an RPC tracker, with real processes on loopback: lent, used, lost, found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install tornado)")

from rewriter.core.errors import DeviceError
from rewriter.measurement.bench import Subject, WorkerBench, save_feeds
from rewriter.measurement.race import Rules, race
from rewriter.runtimes.base import stopwatch
from rewriter.runtimes.tvm import remote
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


def built(board: Devices, folder: Path, seed: int = 0) -> Path:
    lent = replace(target(), remote=f"{board.address}/{KEY}")
    shapes = {name: array.shape for name, array in FEEDS.items()}
    return TvmRemote().build(graphs.encoder(seed), shapes, folder, lent)


def test_it_runs_and_is_timed_there(board: Devices, tmp_path: Path) -> None:
    executable = TvmRemote().load(built(board, tmp_path), 1)
    got = executable.run(FEEDS)
    for name, wanted in run_reference(graphs.encoder(), FEEDS).items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5)
    timed = stopwatch(executable, FEEDS)
    assert all(0 < timed() < 1 for _ in range(3)) and executable.reconnections == 0


def test_subjects_of_a_race_share_the_device(board: Devices, tmp_path: Path) -> None:
    paths = save_feeds([FEEDS], tmp_path / "feeds")
    subjects = [Subject(name, SPEC, built(board, tmp_path / name, seed), paths) for seed, name in enumerate("ab")]
    rules = Rules(least_rounds=2, most_rounds=3, reopen_every=2, block_s=0.002)
    with Worker("device", 1) as shared:
        found = race(subjects, rules=rules, open_bench=lambda one: WorkerBench(one, 1, (), 60.0, shared))
    assert set(found) == {"a", "b"} and not found.failures and not found.peak_bytes


def test_a_lost_device_is_a_clear_error_and_one_that_comes_back_costs_nothing(
    board: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETURN_S", 0.5)
    executable = TvmRemote().load(built(board, tmp_path), 1)
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
