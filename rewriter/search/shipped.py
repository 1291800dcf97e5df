"""What was kept for another engine than TVM: written to the output folder, and loaded from there again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rewriter.core.errors import ModelError
from rewriter.runtimes.base import Executable, Feeds, of_spec
from rewriter.search.decision import Outcome
from rewriter.search.engines import BY_KEY
from rewriter.search.runtime_rows import kept_engine


def ship(outcome: Outcome, place: Path) -> None:
    """Copy the artifact that won, as it was timed and certified, into a folder named like its engine."""
    engine = kept_engine(outcome)
    if engine is None or "/" not in engine.path or outcome.entry is None:
        return
    artifact = outcome.finals.subjects[outcome.entry].artifact
    source = artifact if artifact.is_dir() else artifact.parent
    shutil.copytree(source, place / engine.key, ignore=shutil.ignore_patterns("inductor", "*-*.pt2"))


def load_kept(folder: Path, key: str, threads: int = 1) -> Executable:
    """The artifact that won in an engine other than TVM, for several callers at once.

    `key` is what the folder's report says. Raises `ModelError` where it is not known, gone, or cannot run here.
    """
    if key not in BY_KEY:
        raise ModelError(f"{folder} was made for the runtime {key!r}, which is not known", "Run optimize again")
    engine = BY_KEY[key]
    runtime = of_spec(engine.runtime)
    refusal = runtime.available()
    if refusal is not None:
        raise ModelError(f"{folder} holds a model for {engine.key}: {refusal.why}", "model.onnx runs in ONNX Runtime")
    file = folder / engine.path
    if not file.exists():
        raise ModelError(f"{file} is missing", "Run optimize again")
    return _OneAtATime(runtime.load(file.parent if engine.one_shape else file, threads))


class _OneAtATime:
    """An executable with buffers of its own, behind a lock."""

    def __init__(self, executable: Executable) -> None:
        self._executable, self._lock = executable, threading.Lock()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        with self._lock:
            return self._executable.run(feeds)

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return self._executable.bind(feeds)
