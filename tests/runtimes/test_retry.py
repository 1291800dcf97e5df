"""A call whose child was killed from outside is made once more, and that is told; its own faults are not repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.runtimes.retry import call_twice
from rewriter.runtimes.workers import Worker, WorkerFailure

KILLED = "tests.runtimes.jobs:killed"


@pytest.mark.parametrize(("times", "value"), [(0, "done"), (1, "done"), (2, None)])
def test_killed_by_somebody_else(tmp_path: Path, times: int, value: str | None) -> None:
    told: list[str] = []
    with Worker("build", 1) as worker:
        found = call_twice(worker, KILLED, tmp_path / "count", times, timeout_s=60.0, told=told.append)
    if value is None:
        assert isinstance(found, WorkerFailure) and found.exit_code == -9
    else:
        assert found == value
    assert len(told) == min(times, 1)
    if times:
        outcome = "and succeeded" if value else "and failed again"
        assert "SIGKILL" in told[0] and told[0].endswith(outcome)


def test_its_own_crash_is_its_own(tmp_path: Path) -> None:
    told: list[str] = []
    with Worker("build", 1) as worker:
        found = call_twice(worker, "tests.runtimes.jobs:segfault", timeout_s=60.0, told=told.append)
    assert isinstance(found, WorkerFailure) and found.exit_code == -11 and not told
