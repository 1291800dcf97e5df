"""One subject of a race behind a small port, and the half of it that runs in the worker and holds the clock."""

from __future__ import annotations

import gc
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewriter.core.errors import CrashError, DeviceError, UserError
from rewriter.measurement.memory import own_peak_bytes
from rewriter.runtimes.base import Clocked, Executable, of_spec, stopwatch
from rewriter.runtimes.worker_main import discard, fetch, store
from rewriter.runtimes.workers import FailureKind, Worker, WorkerFailure

_HERE = "rewriter.measurement.bench"
_CALLS, _EXECUTABLE = f"{_HERE}:calls:", f"{_HERE}:executable:"


@dataclass(frozen=True)
class Subject:
    """What races: an artifact in a runtime (``module:Class``) on feeds.

    `feeds` are ``.npz`` files of named inputs, one batch each, used in turn so that inputs do not stay in cache. With
    `whole` a run is one pass over all of them, which may differ in shape, from arrays to arrays.
    """

    name: str
    runtime: str
    artifact: Path
    feeds: tuple[Path, ...]
    whole: bool = False


@dataclass(frozen=True)
class Block:
    """Seconds of single runs, and during how many of them the system gave the core to somebody else.

    `reconnections`: how often a device elsewhere vanished and a run was repeated; `restarts`: how often the process had
    ended since the block before and was started anew.
    """

    runs_s: tuple[float, ...]
    preempted: int = 0
    reconnections: int = 0
    restarts: int = 0


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
    """A subject in a worker process of its own, or in `shared` where its device lends itself to one process only."""

    def __init__(
        self, subject: Subject, threads: int, cores: Sequence[int], timeout_s: float, shared: Worker | None = None
    ) -> None:
        self._subject, self._timeout_s, self._shared = subject, timeout_s, shared
        self._worker = shared or Worker(subject.name, threads, cores=cores)
        self._opened = 0

    def open(self) -> WorkerFailure | None:
        """Load the artifact in the worker."""
        s = self._subject
        arguments = (s.name, s.runtime, s.artifact, s.feeds, self._worker.threads, s.whole)
        result: WorkerFailure | None = self._call("open_subject", *arguments)
        self._opened = self._worker.starts
        return result

    def block(self, runs: int, warm_up: int) -> Block | WorkerFailure:
        """Time a block in the worker, by its own clock."""
        # Another subject may have ended a shared process, or somebody this one, since it was last asked.
        lost = self._worker.pid is None or self._worker.starts != self._opened
        failure = self.open() if lost else None
        if failure is not None:
            return failure
        result: Block | WorkerFailure = self._call("run_block", self._subject.name, runs, warm_up)
        return replace(result, restarts=1) if lost and isinstance(result, Block) else result

    def peak_bytes(self) -> int | None:
        """As the worker's process reports it."""
        result = self._call("peak_bytes", self._subject.name)
        return result if isinstance(result, int) else None

    def close(self) -> None:
        """End the worker, or let go of the subject in a shared one."""
        if self._shared is None:
            self._worker.close()
        elif self._shared.pid is not None:
            self._call("close_subject", self._subject.name)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a subject cannot do is its own failure, whoever is to blame for it: the others race on."""
        try:
            return self._worker.call(f"{_HERE}:{function}", *arguments, timeout_s=self._timeout_s)
        except UserError as error:
            kinds: dict[type[UserError], FailureKind] = {DeviceError: "device", CrashError: "crash"}
            return WorkerFailure(kinds.get(type(error), "error"), str(error))


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


def open_subject(
    name: str, runtime: str, artifact: Path, feeds: Sequence[Path], threads: int, whole: bool = False
) -> None:
    """In the worker: load, bind every batch of feeds, and run each once."""
    executable = of_spec(runtime).load(artifact, threads)
    batches = [load_feeds(path) for path in feeds]
    calls = [_pass(executable, batches)] if whole else [stopwatch(executable, batch) for batch in batches]
    for call in calls:
        call()
    store(_CALLS + name, itertools.cycle(calls))
    store(_EXECUTABLE + name, executable)


def _pass(executable: Executable, batches: Sequence[Mapping[str, np.ndarray]]) -> Callable[[], float]:
    """One run of each batch, what binding would do beforehand included; by its own clock where it runs elsewhere."""
    if isinstance(executable, Clocked):
        clocks = [executable.bind_clock(batch) for batch in batches]
        return lambda: sum(clock() for clock in clocks)
    run, now = executable.run, time.perf_counter

    def timed() -> float:
        begun = now()
        for batch in batches:
            run(batch)
        return now() - begun

    return timed


def close_subject(name: str) -> None:
    """In the worker: forget a subject."""
    discard(_CALLS + name)
    discard(_EXECUTABLE + name)


def run_block(name: str, runs: int, warm_up: int) -> Block:
    """In the worker: a block, feeds in turn, the garbage collector off."""
    calls: Iterator[Callable[[], float]] = fetch(_CALLS + name)
    before = _reconnections(name)
    for call in itertools.islice(calls, warm_up):
        call()
    gc.collect()
    gc.disable()
    try:
        timed = [_timed(call) for call in itertools.islice(calls, runs)]
    finally:
        gc.enable()
    runs_s, preempted = tuple(seconds for seconds, _ in timed), sum(preempted for _, preempted in timed)
    return Block(runs_s, preempted, _reconnections(name) - before)


def peak_bytes(name: str) -> int | None:
    """In the worker: its own peak memory; None when the executable runs elsewhere."""
    return None if isinstance(fetch(_EXECUTABLE + name), Clocked) else own_peak_bytes()


def _reconnections(name: str) -> int:
    executable = fetch(_EXECUTABLE + name)
    return executable.reconnections if isinstance(executable, Clocked) else 0


def _timed(call: Callable[[], float]) -> tuple[float, bool]:
    switches = _switches()
    seconds = call()
    return seconds, _switches() > switches


def _switches() -> int:
    """How often this process had to give way, over all of its threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
