"""Runs in spawned children: imports neither torch nor TVM, so that they start quickly."""

from __future__ import annotations

from pathlib import Path

from rewriter.runtimes.tvm.database import Subject, TuningDatabase


def write_many(path: Path, kernel: str) -> None:
    database = TuningDatabase(path)
    for size in range(50):
        database.add(Subject(kernel, (size,), "float32", "t", "v"), {"seconds": float(size), "filler": "x" * 500})
