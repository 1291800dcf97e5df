"""Long-lived child processes that own one runtime each, and whose faults are values.

A child is a fresh interpreter (``python -c`` with a two-line start), not a `multiprocessing.Process`: spawning through
multiprocessing runs the parent's ``__main__`` again, which is wrong when that is a script without a guard, a
console entry point or a test runner, and it starts a resource tracker that outlives a killed parent. Forking is no
choice: after torch, TVM or CUDA have run in the parent the child hangs. The child gets the parent's ``sys.path``, its
thread counts in the environment before anything numerical is imported, and one end of a socket pair; a closed socket
ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import IO, Any, Literal, Self

from rewriter.core.errors import UserError
from rewriter.runtimes.worker_main import Answer, discard, fetch, store

__all__ = ["Worker", "WorkerFailure", "discard", "fetch", "pinnable", "store"]

_START = (
    "import json, os, sys; settings = json.loads(sys.argv[1]); os.environ.update(settings['environment']);"
    " sys.path[:] = settings['path']; from rewriter.runtimes.worker_main import main; main(settings)"
)
_START_LIMIT_S = 60.0
_WATCH_S = 0.1
_TRACE_S = 0.2
_TAIL_BYTES = 4000


def pinnable(threads: int) -> tuple[int, ...]:
    """A core per thread out of those this process may use, the last ones, as interrupts gather on the first.

    Empty where the system cannot pin, or has fewer cores than threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed[-threads:]) if 0 < threads <= len(allowed) else ()


FailureKind = Literal["crash", "timeout", "memory", "error", "device"]


@dataclass(frozen=True)
class WorkerFailure:
    """Why a call in a worker gave no value. `detail` is one line; `output` the end of what the child wrote.

    ``crash``: the process ended; ``timeout``: it was ended at the time limit; ``memory``: at the memory limit;
    ``error``: the function raised; ``device``: what it runs on elsewhere was lost. After a timeout `output` ends with
    where each thread was. `exit_code` is negative for a signal and None while the process lives on.
    """

    kind: FailureKind
    detail: str
    exit_code: int | None = None
    traceback: str = ""
    output: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class Worker:
    """One child process, started at its first call and again at the first call after it was lost.

    `threads` goes to OpenMP, MKL, OpenBLAS and TVM; `cores` pins the process; `memory_limit_bytes` bounds private
    memory. Use it as a context manager, or call `close`. Not to be shared between threads.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        memory_limit_bytes: int | None = None,
        *,
        cores: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.threads = threads
        self.cores = tuple(cores)
        self.memory_limit_bytes = memory_limit_bytes
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs. `starts` tells whether state stored in an earlier child is lost."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def call(self, spec: str, *arguments: Any, timeout_s: float | None = None, **keywords: Any) -> Any:
        """Run ``module:function`` in the child and return its value, or a `WorkerFailure`.

        Only a `UserError` of the function is raised here, as it was raised there. The start of a child does not count
        against `timeout_s`. Arguments and results travel by pickle.
        """
        request = ForkingPickler.dumps((spec, arguments, keywords))
        failure = self._ensure_started()
        if failure is not None:
            return failure
        assert self._connection is not None and self._output is not None
        # The child appends, so its output is that of this call from here on.
        self._output.truncate(0)
        try:
            self._connection.send_bytes(request)
            received = self._receive(timeout_s)
        except (OSError, EOFError):
            return self._lost()
        except BaseException:
            # Interrupted half-way: an answer still to come would be taken for that of the next call.
            self.close()
            raise
        return received if isinstance(received, WorkerFailure) else self._unpack(received)

    def close(self) -> None:
        """End the child now, with every process it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        if self._output is not None:
            self._output.close()
        self._process = self._connection = self._output = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # While the interpreter goes down, the closed socket ends the child.
        if getattr(self, "_process", None) is not None and not sys.is_finalizing():
            self.close()

    def _ensure_started(self) -> WorkerFailure | None:
        if self.pid is not None:
            return None
        self.close()
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115 - lives as long as the child
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(self._settings(theirs.fileno()))],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self.starts += 1
        try:
            if self._connection.poll(_START_LIMIT_S):
                self._connection.recv_bytes()
                return None
        except (OSError, EOFError):
            return self._lost("could not start")
        return self._stop("timeout", f"did not start within {_START_LIMIT_S:g} s")

    def _settings(self, descriptor: int) -> dict[str, Any]:
        count = str(self.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS")
        environment = dict.fromkeys(names, count)
        if self.cores:
            # TVM binds its threads to cores of its own choice, out of the set given here, unless told not to.
            environment["TVM_BIND_THREADS"] = "0"
        return {
            "environment": environment,
            "path": sys.path,
            "socket": descriptor,
            "cores": self.cores,
            "memory_limit_bytes": self.memory_limit_bytes,
            "parent": os.getpid(),
            # The signal comes when the *thread* that started the child ends, which is only sound for the main one.
            "dies_with_parent": threading.current_thread() is threading.main_thread(),
        }

    def _receive(self, timeout_s: float | None) -> bytes | WorkerFailure:
        assert self._connection is not None
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
            step_s = (
                left_s if self.memory_limit_bytes is None else min(_WATCH_S, _WATCH_S if left_s is None else left_s)
            )
            if self._connection.poll(step_s):
                return self._connection.recv_bytes()
            if self._over_memory():
                return self._stop("memory", f"used more than {self.memory_limit_bytes} bytes")
            if end_s is not None and time.monotonic() >= end_s:
                return self._stop("timeout", f"gave no result within {timeout_s:g} s")

    def _over_memory(self) -> bool:
        if self.memory_limit_bytes is None or self._process is None:
            return False
        import psutil

        try:
            return bool(psutil.Process(self._process.pid).memory_info().rss > self.memory_limit_bytes)
        except psutil.Error:
            return False

    def _unpack(self, received: bytes) -> Any:
        try:
            answer: Answer = ForkingPickler.loads(received)
        except Exception as error:  # noqa: BLE001 - recorded: a result that cannot be read is the child's fault
            return WorkerFailure("error", f"{self.name} sent a result that cannot be read: {error}")
        if answer.kind == "value":
            return answer.value
        if answer.kind == "user" and isinstance(answer.value, UserError):
            raise answer.value
        kind: FailureKind = "memory" if answer.kind == "memory" else "error"
        return WorkerFailure(kind, f"{self.name}: {answer.detail}", traceback=answer.traceback, output=self._tail())

    def _lost(self, happened: str = "ended during a call") -> WorkerFailure:
        """The child is gone: say how."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        code = self._process.poll()
        how = f"with exit code {code}" if code is None or code >= 0 else f"by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        output = self._tail()
        memory = self.memory_limit_bytes is not None and "bad_alloc" in output
        self.close()
        return WorkerFailure("memory" if memory else "crash", f"{self.name} {happened} {how}", code, output=output)

    def _stop(self, kind: FailureKind, why: str) -> WorkerFailure:
        if kind == "timeout" and self.pid is not None:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(_TRACE_S)
        output = self._tail()
        process = self._process
        self.close()
        return WorkerFailure(kind, f"{self.name} {why}", process.returncode if process else None, output=output)

    def _tail(self) -> str:
        if self._output is None:
            return ""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
