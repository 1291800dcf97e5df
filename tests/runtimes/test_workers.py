"""Faults of a child are values; the parent and the next call go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rewriter.core.errors import DataError, UnsupportedOperator
from rewriter.runtimes.workers import Worker, WorkerFailure

JOBS = "tests.runtimes.jobs"


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("test", threads=1) as made:
        yield made


def failure(result: object) -> WorkerFailure:
    assert isinstance(result, WorkerFailure)
    return result


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.02)
    return False


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_value_and_state_between_calls(worker: Worker) -> None:
    assert worker.call(f"{JOBS}:add", 2, b=3) == 5
    worker.call(f"{JOBS}:put", "key", {"a": 1})
    assert worker.call(f"{JOBS}:get", "key") == {"a": 1}
    assert worker.starts == 1


def test_missing_state_is_an_error(worker: Worker) -> None:
    assert "restarted" in failure(worker.call(f"{JOBS}:get", "absent")).detail


@pytest.mark.parametrize(
    ("job", "arguments", "code"), [("segfault", (), -signal.SIGSEGV), ("leave", (3,), 3)], ids=["segfault", "exit"]
)
def test_crash_then_restart(worker: Worker, job: str, arguments: tuple[int, ...], code: int) -> None:
    worker.call(f"{JOBS}:put", "key", 1)
    result = failure(worker.call(f"{JOBS}:{job}", *arguments))
    assert (result.kind, result.exit_code) == ("crash", code)
    assert worker.pid is None
    assert worker.call(f"{JOBS}:add", 1, 1) == 2
    assert failure(worker.call(f"{JOBS}:get", "key")).kind == "error"
    assert worker.starts == 2


def test_segfault_leaves_a_trace(worker: Worker) -> None:
    assert "string_at" in failure(worker.call(f"{JOBS}:segfault")).output


def test_hang_ends_at_the_time_limit(worker: Worker) -> None:
    worker.call(f"{JOBS}:add", 1)
    result = failure(worker.call(f"{JOBS}:hang", timeout_s=0.3))
    assert result.kind == "timeout" and "in hang" in result.output
    assert worker.call(f"{JOBS}:add", 1) == 1


def test_time_limit_takes_grandchildren_too(worker: Worker, tmp_path: Path) -> None:
    failure(worker.call(f"{JOBS}:start_process_and_hang", str(tmp_path), timeout_s=2.0))
    pid = int((tmp_path / "pid").read_text())
    assert eventually(lambda: gone(pid))


@pytest.mark.parametrize("job", ["allocate", "allocate_slowly"])
def test_memory_limit(job: str) -> None:
    with Worker("test", 1, memory_limit_bytes=256 << 20) as worker:
        assert worker.call(f"{JOBS}:allocate", 1 << 20) == 1 << 20
        assert failure(worker.call(f"{JOBS}:{job}", 1 << 30, timeout_s=60.0)).kind == "memory"
        assert worker.call(f"{JOBS}:add", 1) == 1


def test_user_error_passes_through(worker: Worker) -> None:
    with pytest.raises(DataError) as caught:
        worker.call(f"{JOBS}:user_error")
    assert (caught.value.what, caught.value.hint) == ("the array is empty", "Give one sample")
    with pytest.raises(UnsupportedOperator) as other:
        worker.call(f"{JOBS}:unsupported")
    assert (other.value.operator, other.value.node) == ("Foo", "node_3")
    assert "opset 99" in str(other.value)
    assert worker.starts == 1


def test_bug_is_an_error_with_its_traceback(worker: Worker) -> None:
    result = failure(worker.call(f"{JOBS}:bug"))
    assert (result.kind, result.exit_code) == ("error", None)
    assert "ZeroDivisionError: by nought" in result.detail and "in bug" in result.traceback
    assert worker.starts == 1


def test_names_and_results_that_cannot_be_used(worker: Worker) -> None:
    assert "ModuleNotFoundError" in failure(worker.call("no.such.module:f")).detail
    assert "AttributeError" in failure(worker.call(f"{JOBS}:no_such_function")).detail
    assert "cannot pickle" in failure(worker.call(f"{JOBS}:unpicklable")).detail
    assert worker.call(f"{JOBS}:add", 1) == 1


def test_threads_cores_and_nothing_heavy() -> None:
    cores = (min(os.sched_getaffinity(0)),) if hasattr(os, "sched_getaffinity") else ()
    with Worker("test", threads=3, cores=cores) as worker:
        found = worker.call(f"{JOBS}:environment")
    assert (found["OMP_NUM_THREADS"], found["TVM_NUM_THREADS"], found["MKL_NUM_THREADS"]) == ("3", "3", "3")
    assert found["cores"] == list(cores)
    assert found["heavy"] == []
    assert found["main"] is None and found["interrupt"]


def test_output_of_a_child_stays_out_of_ours(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    assert worker.call(f"{JOBS}:chatter") == 7
    assert capfd.readouterr() == ("", "")


def test_killed_from_outside_while_idle(worker: Worker) -> None:
    pid = worker.call(f"{JOBS}:environment")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: gone(pid))
    assert worker.call(f"{JOBS}:add", 4) == 4
    assert worker.starts == 2


def test_killed_from_outside_while_busy(worker: Worker) -> None:
    pid = worker.call(f"{JOBS}:environment")["pid"]
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    result = failure(worker.call(f"{JOBS}:hang", timeout_s=60.0))
    assert (result.kind, result.exit_code) == ("crash", -signal.SIGKILL)


def test_interrupt_in_the_parent_ends_the_call(worker: Worker) -> None:
    worker.call(f"{JOBS}:add", 1)
    pid = worker.pid
    assert pid is not None
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.call(f"{JOBS}:hang", timeout_s=60.0)
    assert gone(pid)
    assert worker.call(f"{JOBS}:add", 9) == 9


_PARENT = """
import sys, threading
from rewriter.runtimes.workers import Worker
worker = Worker("child", 1)
print(worker.call("tests.runtimes.jobs:environment")["pid"], flush=True)
worker.call("tests.runtimes.jobs:hang")
"""
_PARENT_FROM_A_THREAD = """
import sys, threading, time
from rewriter.runtimes.workers import Worker
worker = Worker("child", 1)
def start():
    print(worker.call("tests.runtimes.jobs:environment")["pid"], flush=True)
thread = threading.Thread(target=start); thread.start(); thread.join(); time.sleep(0.2)
print(worker.call("tests.runtimes.jobs:add", 1), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("script", [_PARENT, _PARENT_FROM_A_THREAD], ids=["busy", "idle, started by a thread"])
def test_killed_parent_takes_its_children_along(script: str, tmp_path: Path) -> None:
    # A script without a main guard: it must not run again in the child.
    file = tmp_path / "parent.py"
    file.write_text(f"import sys; sys.path[:] = {sys.path!r}\n{script}")
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if script is _PARENT_FROM_A_THREAD:
        assert parent.stdout.readline() == "1\n"
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: gone(pid))
