"""AMX for tests: processes in which tile instructions run, emulated where the processor has none.

Compiled with the C compiler of the machine. A worker of the product is the child, so that nothing emulated ever
runs in the process of the tests, and a tile instruction that goes wrong costs one call.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker

HERE = Path(__file__).parent
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
EMULATOR = "AMX_EMULATOR"  # names the library to the child, empty where the processor has AMX


def shared_library(name: str, folder: Path, *flags: str) -> Path:
    """A C file of this folder as a shared library; skips, visibly, where it cannot be made."""
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("AMX is emulated on x86-64 with a C compiler")
    built = folder / f"{name}.so"
    done = subprocess.run(
        [compiler, *FLAGS, *flags, HERE / f"{name}.c", "-o", built], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return built


def native() -> bool:
    """Whether this processor runs tile instructions itself."""
    return amx.among(detect("cpu").features)


def environment(emulator: Path | None) -> dict[str, str]:
    """Of a process that is to have AMX."""
    return {} if emulator is None else {"LD_PRELOAD": str(emulator), EMULATOR: str(emulator)}


@contextmanager
def worker(emulator: Path | None, threads: int = 1, ask: bool = True) -> Iterator[Worker]:
    """A worker that has AMX: emulated by this library, or natively. With `ask` it has asked for permission."""
    with Worker("amx", threads) as child:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(emulator).items():
                patch.setenv(name, value)
            child.call("tests.runtimes.amx_emulator.jobs:begin", ask)
        yield child
