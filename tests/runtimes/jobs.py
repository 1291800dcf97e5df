"""What the worker tests run in a child."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rewriter.core.errors import DataError, UnsupportedOperator
from rewriter.runtimes.workers import fetch, store


def add(a: int, b: int = 0) -> int:
    return a + b


def segfault() -> None:
    ctypes.string_at(0)


def leave(code: int) -> None:
    os._exit(code)


def hang() -> None:
    # Native code that keeps the interpreter lock, as a compiler would.
    ctypes.PyDLL(None).sleep(600)


def allocate(size: int) -> int:
    return len(b"\x01" * size)


def allocate_slowly(size: int) -> int:
    blocks = []
    for _ in range(64):
        blocks.append(b"\x01" * (size // 64))
        time.sleep(0.02)
    return sum(map(len, blocks))


def user_error() -> None:
    raise DataError("the array is empty", "Give one sample")


def unsupported() -> None:
    raise UnsupportedOperator("an engine", "Foo", "node_3", "opset 99")


def bug() -> None:
    raise ZeroDivisionError("by nought")


def unpicklable() -> Any:
    return threading.Lock()


def put(key: str, value: Any) -> None:
    store(key, value)


def get(key: str) -> Any:
    return fetch(key)


def environment() -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS")
    return {
        **{name: os.environ.get(name) for name in names},
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "heavy": sorted({"torch", "tvm", "onnxruntime"} & set(sys.modules)),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "pid": os.getpid(),
    }


def chatter() -> int:
    print("to the standard output")
    os.write(2, b"to the standard error\n")
    return 7


def start_process() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def start_process_and_hang(folder: str) -> None:
    with open(os.path.join(folder, "pid"), "w") as file:  # noqa: PTH118, PTH123
        file.write(str(start_process()))
    hang()


def killed(count: Path, times: int) -> str:
    """Killed by a signal from outside as often as asked, counted in a file."""
    done = len(count.read_text()) if count.exists() else 0
    if done < times:
        count.write_text("x" * (done + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"
