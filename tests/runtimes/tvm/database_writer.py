"""Runs in spawned children: imports neither torch nor TVM, so that they start quickly."""

from __future__ import annotations

import itertools
import resource
import signal
from pathlib import Path

from rewriter.core.errors import OutputError
from rewriter.runtimes.tvm.database import Subject, TuningDatabase


def write_many(path: Path, kernel: str, count: int = 50) -> None:
    database = TuningDatabase(path)
    for size in range(count):
        database.add(Subject(kernel, (size,), "float32", "t", "v"), {"seconds": float(size), "filler": "x" * 500})


def write_until_full(path: Path, most_bytes: int) -> None:
    """Exits with 0 if the first write beyond the limit was a clear error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    database = TuningDatabase(path)
    for size in itertools.count():
        try:
            database.add(Subject("full", (size,), "float32", "t", "v"), {"seconds": 1.0, "filler": "x" * 500})
        except OutputError as error:
            assert "cannot write" in str(error) and path.name in str(error)
            return
