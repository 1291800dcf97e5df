"""The coordinator of a race, with fakes in place of processes and clocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rewriter.core.measurement import ENOUGH_BLOCKS, Decision, Measurement, decide
from rewriter.measurement.bench import Bench, Block, Subject
from rewriter.measurement.race import Progress, RaceResult, Rules, compare, race
from rewriter.runtimes.workers import WorkerFailure

CRASH = WorkerFailure("crash", "it fell over", -11)


@dataclass
class Machine:
    """A pretended machine: time passes only while a subject runs, and drifts from round to round."""

    now_s: float = 0.0
    drift: float = 1.0
    log: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def clock(self) -> float:
        return self.now_s


@dataclass
class FakeBench:
    machine: Machine
    name: str
    latency_s: float
    noise: float = 0.0
    fails_to_open: bool = False
    fails_at: int | None = None
    blocks: int = 0
    opened: int = 0
    sizes: list[int] = field(default_factory=list)

    def open(self) -> WorkerFailure | None:
        self.opened += 1
        return CRASH if self.fails_to_open else None

    def block(self, runs: int, warm_up: int) -> Block | WorkerFailure:
        self.blocks += 1
        self.sizes.append(runs)
        self.machine.log.append(self.name)
        if self.blocks == self.fails_at:
            return CRASH
        took = tuple(
            self.latency_s * self.machine.drift * (1 + self.noise * self.machine.random.random()) for _ in range(runs)
        )
        self.machine.now_s += sum(took)
        return Block(took, preempted=1)

    def peak_bytes(self) -> int | None:
        return 1000

    def close(self) -> None:
        self.machine.closed.append(self.name)


def run(
    benches: Sequence[FakeBench], machine: Machine, rules: Rules, progress: Callable[[Progress], None] | None = None
) -> RaceResult:
    named = {bench.name: bench for bench in benches}
    subjects = [Subject(bench.name, "m:C", Path("a"), (Path("f.npz"),)) for bench in benches]

    def open_bench(subject: Subject) -> Bench:
        return named[subject.name]

    return race(subjects, rules=rules, clock=machine.clock, open_bench=open_bench, progress=progress)


def drifting(machine: Machine) -> Callable[[Progress], None]:
    def step(_: Progress) -> None:
        machine.drift = 1.0 + machine.random.random() * 2.0

    return step


def test_ratios_are_right_though_the_machine_drifts() -> None:
    machine = Machine()
    benches = [FakeBench(machine, "base", 0.010, 0.02), FakeBench(machine, "new", 0.005, 0.02)]
    result = run(benches, machine, Rules(margin=1e-9, most_rounds=30), drifting(machine))
    ratio = compare(result, "base")["new"]
    assert ratio.median == pytest.approx(2.0, rel=0.02)
    assert decide(ratio) is Decision.FASTER
    spread = [block[0] for block in result["base"].blocks_s]
    assert max(spread) > 1.5 * min(spread)


def test_order_changes_from_round_to_round_and_is_repeatable() -> None:
    logs = []
    for _ in range(2):
        machine = Machine()
        run([FakeBench(machine, name, 0.01) for name in "abc"], machine, Rules(least_rounds=20))
        logs.append(machine.log)
    assert logs[0] == logs[1]
    rounds = logs[0]
    orders = {tuple(rounds[i : i + 3]) for i in range(0, len(rounds), 3)}
    assert all(sorted(order) == list("abc") for order in orders) and len(orders) >= 4
    assert {order[0] for order in orders} == set("abc")


def test_it_stops_when_the_ratio_is_known() -> None:
    machine = Machine()
    seen: list[Progress] = []
    benches = [FakeBench(machine, "base", 0.01, 1e-4), FakeBench(machine, "new", 0.02, 1e-4)]
    result = run(benches, machine, Rules(least_rounds=8, most_rounds=1000, margin=0.01), seen.append)
    assert result.stopped == "narrow"
    assert len(result["base"].blocks_s) == 8 == seen[-1].round
    assert seen[-1].widest < 0.01 and seen[-1].elapsed_s > 0


def test_it_goes_on_while_the_ratio_is_not_known() -> None:
    machine = Machine()
    benches = [FakeBench(machine, "base", 0.1, 0.5), FakeBench(machine, "new", 0.1, 0.5)]
    result = run(benches, machine, Rules(least_rounds=8, most_rounds=25, margin=0.001, budget_s=1e9))
    assert result.stopped == "rounds" and len(result["new"].blocks_s) == 25


def test_budget_ends_it_but_not_before_an_interval_exists() -> None:
    machine = Machine()
    benches = [FakeBench(machine, "base", 1.0, 0.5), FakeBench(machine, "new", 1.0, 0.5)]
    result = run(benches, machine, Rules(margin=0.001, budget_s=0.5))
    assert result.stopped == "budget" and len(result["new"].blocks_s) == ENOUGH_BLOCKS


def test_blocks_last_about_as_long_as_asked_and_warm_rounds_do_not_count() -> None:
    machine = Machine()
    fast, slow, tiny = (
        FakeBench(machine, "fast", 0.01),
        FakeBench(machine, "slow", 3.0),
        FakeBench(machine, "tiny", 1e-6),
    )
    rules = Rules(block_s=0.1, least_rounds=6, most_rounds=6, warm_rounds=2, most_runs=500)
    result = run([fast, slow, tiny], machine, rules)
    assert (set(fast.sizes[1:]), set(slow.sizes[1:]), set(tiny.sizes[1:])) == ({10}, {1}, {500})
    assert fast.blocks == 1 + 2 + 6 and len(result["fast"].blocks_s) == 6


@pytest.mark.parametrize("how", ["open", "first block", "later block"])
def test_a_failing_subject_is_recorded_and_cannot_win(how: str) -> None:
    machine = Machine()
    bad = FakeBench(
        machine, "bad", 1e-5, fails_to_open=how == "open", fails_at={"first block": 1, "later block": 5}.get(how)
    )
    result = run([FakeBench(machine, "base", 0.01), bad, FakeBench(machine, "new", 0.005)], machine, Rules())
    assert set(result) == {"base", "new"} and result.failures == {"bad": CRASH}
    assert set(compare(result, "base")) == {"new"}
    assert machine.log.count("bad") <= 5
    assert set(machine.closed) == {"base", "bad", "new"}
    assert len(result["base"].blocks_s) == len(result["new"].blocks_s)


def test_a_failing_baseline_leaves_nothing_to_compare_with() -> None:
    machine = Machine()
    benches = [FakeBench(machine, "base", 0.01, fails_at=4), FakeBench(machine, "new", 0.005)]
    result = run(benches, machine, Rules())
    assert set(result) == {"new"} and result.failures == {"base": CRASH}
    with pytest.raises(KeyError):
        compare(result, "base")


def test_nobody_left() -> None:
    machine = Machine()
    result = run([FakeBench(machine, "base", 0.01, fails_to_open=True)], machine, Rules())
    assert result.stopped == "nothing left" and len(result) == 0 and machine.closed


def test_everybody_starts_anew_as_often_as_asked() -> None:
    machine = Machine()
    benches = [FakeBench(machine, "base", 0.01), FakeBench(machine, "new", 0.02, fails_at=9)]
    result = run(benches, machine, Rules(least_rounds=8, most_rounds=8, reopen_every=3))
    # Opening, a warm-up round and three rounds, three times; the last time without the one that failed there.
    assert (benches[0].opened, benches[1].opened) == (3, 2)
    assert benches[0].blocks == 3 * 2 + 8 and len(result["base"].blocks_s) == 8
    assert compare(result, "base") == {}


def test_everybody_is_closed_when_it_is_interrupted() -> None:
    machine = Machine()

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([FakeBench(machine, "base", 0.01), FakeBench(machine, "new", 0.01)], machine, Rules(), interrupt)
    assert machine.closed[-2:] == ["base", "new"]


def test_environment_and_memory_travel_with_the_result() -> None:
    machine = Machine()
    result = run([FakeBench(machine, "base", 0.01), FakeBench(machine, "new", 0.01)], machine, Rules())
    assert result.peak_bytes == {"base": 1000, "new": 1000}
    assert result["new"].environment["preempted_runs"] == str(len(result["new"].blocks_s))
    assert {"processor", "load_1_minute", "load_1_minute_after", "version numpy"} <= set(result["new"].environment)
    assert isinstance(result["new"], Measurement)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_must_differ(names: list[str]) -> None:
    with pytest.raises(ValueError, match="different names"):
        race([Subject(name, "m:C", Path("a"), ()) for name in names])
