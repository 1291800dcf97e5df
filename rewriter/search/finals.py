"""The finals: the best few variants and their rivals in one interleaved race, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewriter.core.errors import UserError
from rewriter.core.measurement import Decision, Interval, decide, speedup
from rewriter.core.options import Runtime
from rewriter.measurement.bench import Subject, WorkerBench, save_feeds
from rewriter.measurement.race import Progress, RaceResult, Rules, race
from rewriter.runtimes.standard import to_standard
from rewriter.runtimes.workers import Worker
from rewriter.search.caches import converted
from rewriter.search.session import ONNXRUNTIME, ONNXRUNTIME_INT8, Session
from rewriter.search.variant import Variant

ORIGINAL = "original"
# Two processes of one artifact differ by about this much by chance (layout of memory), whatever the interval says.
MARGIN = 0.02
RIVAL, RIVAL_INT8 = "onnxruntime", "onnxruntime_int8"


def under_onnxruntime(name: str) -> str:
    """The name of a variant's entry under ONNX Runtime."""
    return RIVAL if name == ORIGINAL else f"{name}@onnxruntime"


@dataclass(frozen=True)
class Finals:
    """Measurements by entry. A variant enters under TVM by its name, under ONNX Runtime as ``name@onnxruntime``.

    `asked` is the runtime that the result is for: with ``auto`` the faster entry of a variant stands for it. Where TVM
    cannot run the original at all, ONNX Runtime decides.
    """

    result: RaceResult
    subjects: dict[str, Subject]
    asked: Runtime
    notes: list[str] = field(default_factory=list)

    def entry(self, name: str) -> str | None:
        """The entry that stands for a variant: None if none was measured."""
        ported = under_onnxruntime(name)
        allowed = {"tvm": [name], "onnxruntime": [ported], "auto": [name, ported]}[self.asked]
        if ORIGINAL not in self.result:
            allowed = [ported]
        measured = [entry for entry in allowed if entry in self.result]
        return min(measured, key=lambda entry: self.result[entry].latency_s().median, default=None)

    def entry_ratio(self, entry: str | None, against: str | None) -> Interval | None:
        """How many times faster one entry is than another; None if either was not measured."""
        if entry is None or against is None or entry not in self.result or against not in self.result:
            return None
        return speedup(self.result[against], self.result[entry])

    def faster(self, name: str, against: str = ORIGINAL) -> bool:
        """Whether a variant certainly beats another: a tie, a doubt or a missing time is a no."""
        ratio = self.entry_ratio(self.entry(name), self.entry(against))
        return ratio is not None and decide(ratio, MARGIN) is Decision.FASTER

    def subject(self, name: str) -> Subject:
        """What stands for a measured variant; KeyError for one that was not."""
        return self.subjects[self.entry(name) or name]

    def latency(self, name: str) -> Interval | None:
        """Latency of what stands for a variant, seconds."""
        entry = self.entry(name)
        return None if entry is None else self.result[entry].latency_s()


def run_finals(session: Session, variants: Sequence[Variant], rivals: bool, rules: Rules) -> Finals:
    """Build every variant for the asked runtimes and race them; the original comes first.

    A variant or rival that cannot be built is left out with a note. With `rivals`, ONNX Runtime on the untouched model
    (fp32 and dynamic int8) and on the variants takes part.
    """
    here = not session.target.remote
    feeds = save_feeds(session.workload.feeds, session.folder / "feeds")
    asked = session.options.runtime
    subjects: dict[str, Subject] = {}
    notes: list[str] = [] if here else ["ONNX Runtime was not timed: it is not on the device"]

    def enter(name: str, runtime: str, variant: Variant | None) -> None:
        try:
            artifact = _built(session, name, runtime, variant)
            subjects[name] = Subject(name, runtime, artifact, _own_feeds(session, variant, feeds))
        except UserError as problem:
            notes.append(f"{name} could not be built and takes no part: {problem}")

    for variant in variants:
        if asked != "onnxruntime":
            enter(variant.name, session.engine, variant)
    if here and (rivals or asked != "tvm" or ORIGINAL not in subjects):
        enter(RIVAL, ONNXRUNTIME, None)
        for variant in variants:
            if variant.name != ORIGINAL:
                enter(under_onnxruntime(variant.name), ONNXRUNTIME, variant)
    if here and rivals:
        enter(RIVAL_INT8, ONNXRUNTIME_INT8, None)

    def report(state: Progress) -> None:
        session.progress.advance(min(1.0, state.elapsed_s / rules.budget_s))

    threads = session.target.threads
    with Worker("device", threads) as shared:
        apart = None if here else lambda one: WorkerBench(one, threads, (), rules.timeout_s, shared)
        result = race(list(subjects.values()), threads=threads, rules=rules, progress=report, open_bench=apart)
    notes += [f"{name} failed while being timed: {failure}" for name, failure in result.failures.items()]
    session.variants_timed += len(result)
    return Finals(result, subjects, asked, notes)


def _own_feeds(session: Session, variant: Variant | None, feeds: tuple[Path, ...]) -> tuple[Path, ...]:
    """The same inputs with caches of the variant's own sizes, where it changed them."""
    maps = {} if variant is None else variant.caches
    if variant is None or not maps:
        return feeds
    return save_feeds(
        [converted(one, maps) for one in session.workload.feeds], session.folder / f"feeds-{variant.name}"
    )


def _built(session: Session, name: str, runtime: str, variant: Variant | None) -> Path:
    label = name.replace("@", "-").replace(" ", "-")
    if variant is None:
        return session.build(session.graph, label, runtime)
    graph = variant.graph if runtime == session.engine else to_standard(variant.graph)
    return session.build(graph, label, runtime)
