"""One subject of a race behind a small port, and the half of it that runs in the worker and holds the clock."""

from __future__ import annotations

import gc
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewriter.runtimes.base import of_spec
from rewriter.runtimes.worker_main import fetch, store
from rewriter.runtimes.workers import Worker, WorkerFailure

_HERE = "rewriter.measurement.bench"


@dataclass(frozen=True)
class Subject:
    """What races: an artifact in a runtime (``module:Class``) on feeds.

    `feeds` are ``.npz`` files of named inputs, one batch each, used in turn so that inputs do not stay in cache.
    """

    name: str
    runtime: str
    artifact: Path
    feeds: tuple[Path, ...]


@dataclass(frozen=True)
class Block:
    """Seconds of single runs, and during how many of them the system gave the core to somebody else."""

    runs_s: tuple[float, ...]
    preempted: int = 0


class Bench(Protocol):
    """A subject that can be timed in blocks."""

    def open(self) -> WorkerFailure | None:
        """Load everything and run each of the feeds once."""
        ...

    def block(self, runs: int, warm_up: int) -> Block | WorkerFailure:
        """`runs` single runs, after `warm_up` that are not counted."""
        ...

    def peak_bytes(self) -> int | None:
        """Peak resident memory of the process so far, or None when unknown."""
        ...

    def close(self) -> None:
        """End the process, if there is one; `open` may follow."""
        ...


class WorkerBench:
    """A subject in a worker process of its own."""

    def __init__(self, subject: Subject, threads: int, cores: Sequence[int], timeout_s: float) -> None:
        self._subject, self._timeout_s = subject, timeout_s
        self._worker = Worker(subject.name, threads, cores=cores)

    def open(self) -> WorkerFailure | None:
        """Load the artifact in the worker."""
        s = self._subject
        arguments = (s.runtime, s.artifact, s.feeds, self._worker.threads)
        result: WorkerFailure | None = self._worker.call(f"{_HERE}:open_subject", *arguments, timeout_s=self._timeout_s)
        return result

    def block(self, runs: int, warm_up: int) -> Block | WorkerFailure:
        """Time a block in the worker, by its own clock."""
        result: Block | WorkerFailure
        result = self._worker.call(f"{_HERE}:run_block", runs, warm_up, timeout_s=self._timeout_s)
        return result

    def peak_bytes(self) -> int | None:
        """As the worker's process reports it."""
        result = self._worker.call("rewriter.measurement.memory:own_peak_bytes", timeout_s=self._timeout_s)
        return result if isinstance(result, int) else None

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def save_feeds(batches: Sequence[Mapping[str, Any]], folder: Path) -> tuple[Path, ...]:
    """Write batches of named arrays as the files a `Subject` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"feeds_{index}.npz" for index in range(len(batches)))
    for path, batch in zip(paths, batches, strict=True):
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch.items()}
        np.savez(path, **arrays)
    return paths


def load_feeds(path: Path) -> dict[str, np.ndarray]:
    """The inverse of `save_feeds` for one file."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def open_subject(runtime: str, artifact: Path, feeds: Sequence[Path], threads: int) -> None:
    """In the worker: load, bind every batch of feeds, and run each once."""
    executable = of_spec(runtime).load(artifact, threads)
    calls = [executable.bind(load_feeds(path)) for path in feeds]
    for call in calls:
        call()
    store(_HERE, itertools.cycle(calls))


def run_block(runs: int, warm_up: int) -> Block:
    """In the worker: a block, feeds in turn, the garbage collector off."""
    calls: Iterator[Callable[[], None]] = fetch(_HERE)
    for call in itertools.islice(calls, warm_up):
        call()
    gc.collect()
    gc.disable()
    try:
        timed = [_timed(call) for call in itertools.islice(calls, runs)]
    finally:
        gc.enable()
    return Block(tuple(seconds for seconds, _ in timed), sum(preempted for _, preempted in timed))


def _timed(call: Callable[[], None]) -> tuple[float, bool]:
    switches, begun = _switches(), time.perf_counter()
    call()
    return time.perf_counter() - begun, _switches() > switches


def _switches() -> int:
    """How often this process had to give way, over all of its threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
