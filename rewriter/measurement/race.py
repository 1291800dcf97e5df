"""Several subjects timed against each other: short blocks in turn, one process each, until the ratios are known.

Times of one subject drift with the machine by tens of percent; ratios of blocks taken one after the other do
not. So nothing is ever compared across races, and the result of a race is its ratios, with bootstrap intervals.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rewriter.core.measurement import ENOUGH_BLOCKS, Interval, Measurement, speedup
from rewriter.measurement import environment
from rewriter.measurement.bench import Bench, Block, Subject, WorkerBench
from rewriter.runtimes.retry import ended_from_outside
from rewriter.runtimes.workers import WorkerFailure

Stopped = Literal["narrow", "rounds", "budget", "nothing left", "device lost"]


@dataclass(frozen=True)
class Rules:
    """How long a race goes on.

    It stops after at least `least_rounds` once every ratio to the first subject is known to ``± margin`` of itself,
    and at the latest after `most_rounds`, or `budget_s` once there are enough blocks for an interval. A block lasts
    about `block_s`; the first `warm_rounds` rounds and the first `warm_up_runs` of each block do not count.

    After `reopen_every` rounds (0: never) everybody starts in new processes: where memory happens to lie can make one
    process a percent faster than the next for all of its life. Simulated with a percent for that and a percent of
    noise between blocks, equals in one process each are called different in 61 % of races, in four each in 10 %.
    """

    least_rounds: int = 12
    most_rounds: int = 100
    budget_s: float = 60.0
    margin: float = 0.01
    block_s: float = 0.1
    warm_rounds: int = 1
    warm_up_runs: int = 1
    most_runs: int = 500
    reopen_every: int = 6
    timeout_s: float = 120.0
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a race stands: for a line on the screen. `widest` is the half width of the least certain ratio."""

    round: int
    most_rounds: int
    elapsed_s: float
    widest: float


@dataclass(frozen=True)
class RaceResult(Mapping[str, Measurement]):
    """Measurements by subject. A subject that failed is in `failures` instead, so it cannot win anything.

    Where the device was lost for good, what was measured until then stays, and `retries` says so; it also has a
    sentence for everything that was tried again because a process or the device was lost on the way.
    """

    measurements: dict[str, Measurement]
    failures: dict[str, WorkerFailure]
    stopped: Stopped
    peak_bytes: dict[str, int] = field(default_factory=dict)
    retries: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measurement:
        return self.measurements[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measurements)

    def __len__(self) -> int:
        return len(self.measurements)


def race(
    subjects: Sequence[Subject],
    *,
    threads: int = 1,
    rules: Rules | None = None,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    open_bench: Callable[[Subject], Bench] | None = None,
) -> RaceResult:
    """Time `subjects` on `threads` threads each, all pinned to the same cores; the first one is the baseline.

    `clock` and `open_bench` are there for tests. Names must differ, else ValueError.
    """
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a race needs subjects with different names, not {names}")
    rules = rules or Rules()
    cores = environment.pinnable(threads)
    around = environment.describe(threads, cores)
    make = open_bench or (lambda subject: WorkerBench(subject, threads, cores, rules.timeout_s))
    contest = _Contest(rules, {subject.name: make(subject) for subject in subjects})
    try:
        contest.open()
        stopped = contest.run(clock, progress)
        peaks = contest.peaks()
    finally:
        contest.close()
    around["load_1_minute_after"] = environment.describe(threads, cores)["load_1_minute"]
    measurements = {
        name: Measurement(name, tuple(b.runs_s for b in blocks), around | _disturbance(blocks), tuple(contest.starts))
        for name, blocks in contest.blocks.items()
        if blocks
    }
    return RaceResult(measurements, contest.failures, stopped, peaks, tuple(contest.retries))


def compare(measurements: Mapping[str, Measurement], baseline: str, confidence: float = 0.95) -> dict[str, Interval]:
    """How many times faster than `baseline` each of the others is."""
    reference = measurements[baseline]
    others = {name: measured for name, measured in measurements.items() if name != baseline}
    return {name: speedup(reference, measured, confidence) for name, measured in others.items()}


def _nobodys_fault(failure: WorkerFailure) -> bool:
    """Whether something outside of the subject stopped it: whoever killed its process, or a device that went away."""
    return failure.kind == "device" or ended_from_outside(failure)


def _disturbance(blocks: Sequence[Block]) -> dict[str, str]:
    """How many runs another process interrupted: on a quiet machine next to none."""
    runs = sum(len(block.runs_s) for block in blocks)
    lost = sum(block.reconnections for block in blocks)
    found = {"runs": str(runs), "preempted_runs": str(sum(block.preempted for block in blocks))}
    return found | ({"device_reconnections": str(lost)} if lost else {})


class _Contest:
    """The coordinator: who is still in, and what they took."""

    def __init__(self, rules: Rules, benches: dict[str, Bench]) -> None:
        self.rules, self.benches = rules, benches
        self.blocks: dict[str, list[Block]] = {name: [] for name in benches}
        self.failures: dict[str, WorkerFailure] = {}
        self.runs: dict[str, int] = {}
        self.starts: list[int] = []
        self.retries: list[str] = []
        self.lost: WorkerFailure | None = None
        self._random = random.Random(rules.seed)

    @property
    def running(self) -> list[str]:
        return [name for name in self.benches if name not in self.failures]

    def open(self) -> None:
        """Load everybody still in, one after the other in any order, and find how many runs fill a block."""
        for name in self._shuffled():
            self.benches[name].close()
            first = self._started(name)
            if isinstance(first, WorkerFailure) and _nobodys_fault(first):
                first = self._again(name, first, self._started)
            if self.lost is not None:
                return
            if isinstance(first, WorkerFailure):
                self._drop(name, first)
                continue
            fitting = round(self.rules.block_s / max(float(np.median(first.runs_s)), 1e-9))
            self.runs[name] = min(max(1, fitting), self.rules.most_runs)

    def run(self, clock: Callable[[], float], progress: Callable[[Progress], None] | None) -> Stopped:
        """Rounds until the rules say stop."""
        begun_s, every = clock(), self.rules.reopen_every
        self._warm_up()
        for number in range(1, self.rules.most_rounds + 1):
            if every and number > 1 and number % every == 1 % every:
                self.open()
                self._warm_up()
            if self.lost is None:
                self._round(number)
            if self.lost is not None:
                self.failures |= {name: self.lost for name in self.running if not self.blocks[name]}
                return "device lost"
            if not self.running:
                return "nothing left"
            elapsed_s, widest = clock() - begun_s, self._widest()
            if progress is not None:
                progress(Progress(number, self.rules.most_rounds, elapsed_s, widest))
            if number >= self.rules.least_rounds and widest <= self.rules.margin:
                return "narrow"
            if number >= ENOUGH_BLOCKS and elapsed_s >= self.rules.budget_s:
                return "budget"
        return "rounds"

    def peaks(self) -> dict[str, int]:
        """Peak memory of who is left, where known."""
        found = {name: self.benches[name].peak_bytes() for name in self.running}
        return {name: peak for name, peak in found.items() if peak is not None}

    def close(self) -> None:
        """End every process."""
        for bench in self.benches.values():
            bench.close()

    def _shuffled(self) -> list[str]:
        return self._random.sample(self.running, len(self.running))

    def _warm_up(self) -> None:
        for _ in range(self.rules.warm_rounds):
            if self.lost is None:
                self._round()

    def _round(self, number: int = 0) -> None:
        """One block of everybody, in an order of its own: neighbours would otherwise always meet the same caches.

        Rounds with a number count once everybody has their block: half a round pairs with nothing.
        """
        taken: dict[str, Block] = {}
        for name in self._shuffled():
            block = self._block(name)
            if isinstance(block, Block) and block.restarts:
                self.retries.append(f"{name}: its process had ended between two blocks and was started again")
            if isinstance(block, WorkerFailure) and _nobodys_fault(block):
                block = self._again(name, block, self._block)
            if self.lost is not None:
                return
            if isinstance(block, WorkerFailure):
                self._drop(name, block)
            else:
                taken[name] = block
        if number:
            every = self.rules.reopen_every
            self.starts.append((number - 1) // every if every else 0)
            for name, block in taken.items():
                self.blocks[name].append(block)

    def _started(self, name: str) -> Block | WorkerFailure:
        """The first few runs in a new process."""
        failure = self.benches[name].open()
        return failure if failure is not None else self.benches[name].block(3, self.rules.warm_up_runs)

    def _block(self, name: str) -> Block | WorkerFailure:
        return self.benches[name].block(self.runs[name], self.rules.warm_up_runs)

    def _again(
        self, name: str, failure: WorkerFailure, action: Callable[[str], Block | WorkerFailure]
    ) -> Block | WorkerFailure:
        """Once more what somebody else stopped. A device that is gone then ends the race with what it has."""
        found = action(name)
        done = "and succeeded" if isinstance(found, Block) else f"and failed again ({found})"
        self.retries.append(f"{name}: {failure}; tried once more {done}")
        if isinstance(found, WorkerFailure) and found.kind == "device":
            self.lost = found
            rounds = len(self.starts)
            self.retries.append(f"the race ended early, while {name} was run; {rounds} rounds before that were kept")
        return found

    def _drop(self, name: str, failure: WorkerFailure) -> None:
        self.failures[name] = failure
        if self.lost is None:
            self.blocks[name] = []
        self.benches[name].close()

    def _widest(self) -> float:
        """Half the width of the least certain ratio to the first subject still in, relative to the ratio."""
        left = {name: tuple(block.runs_s for block in self.blocks[name]) for name in self.running}
        first, *others = (Measurement(name, blocks, {}, tuple(self.starts)) for name, blocks in left.items())
        ratios = [speedup(first, other) for other in others]
        return max(((ratio.high - ratio.low) / 2.0 / ratio.median for ratio in ratios), default=0.0)
