"""The finals: the best few variants and their rivals in one interleaved race, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rewriter.core.errors import ModelError
from rewriter.core.measurement import Decision, Interval, decide, speedup
from rewriter.core.options import Runtime
from rewriter.measurement.bench import Subject, WorkerBench
from rewriter.measurement.race import Progress, RaceResult, Rules, race
from rewriter.runtimes.workers import Worker
from rewriter.search.engines import BY_KEY, PEERS, Engine, absent, asked_peers
from rewriter.search.entrants import ORIGINAL, RIVAL, RIVAL_INT8, Entrants, entry_name
from rewriter.search.session import Session
from rewriter.search.variant import Variant

__all__ = ["MARGIN", "ORIGINAL", "RIVAL", "RIVAL_INT8", "TVM", "Finals", "run_finals", "under_onnxruntime"]

# Two processes of one artifact differ by about this much by chance (layout of memory), whatever the interval says.
MARGIN = 0.02
TVM = "tvm"
_USUAL_ENTRIES = 6
# On the original: an engine slower than the fastest by more is not given the variants too.
_HOPELESS = 1.5
_HEAT = Rules(least_rounds=3, most_rounds=3, reopen_every=0)
_ONNXRUNTIME = BY_KEY["onnxruntime"]


def under_onnxruntime(name: str) -> str:
    """The name of a variant's entry under ONNX Runtime."""
    return entry_name(name, _ONNXRUNTIME.key)


@dataclass(frozen=True)
class Finals:
    """Measurements by entry. A variant enters under TVM by its name, under others as ``name@engine``.

    `asked` is the runtime that the result is for: with ``auto`` the fastest entry of a variant stands for it, of those
    that compute in the graph's own numbers. Where none of them runs the original, ONNX Runtime decides.
    """

    result: RaceResult
    subjects: dict[str, Subject]
    asked: Runtime
    notes: list[str] = field(default_factory=list)

    def entry(self, name: str) -> str | None:
        """The entry that stands for a variant: None if none was measured."""
        allowed = self._own(name)
        if not any(entry in self.result for entry in self._own(ORIGINAL)):
            allowed = [under_onnxruntime(name)]
        measured = [entry for entry in allowed if entry in self.result]
        return min(measured, key=lambda entry: self.result[entry].latency_s().median, default=None)

    def rounded(self, name: str) -> list[str]:
        """Measured entries of a variant in engines that round, which stand for nothing before they were scored."""
        engines = (engine for engine in asked_peers(self.asked) if engine.rounds)
        return [entry for engine in engines if (entry := entry_name(name, engine.key)) in self.result]

    def engine(self, entry: str) -> str:
        """The key of the engine that an entry ran in."""
        runtime = self.subjects[entry].runtime
        return next((engine.key for engine in PEERS if engine.runtime == runtime), TVM)

    def _own(self, name: str) -> list[str]:
        peers = [entry_name(name, engine.key) for engine in asked_peers(self.asked) if not engine.rounds]
        return [name, *peers] if self.asked in (TVM, "auto") else peers

    def entry_ratio(self, entry: str | None, against: str | None) -> Interval | None:
        """How many times faster one entry is than another; None if either was not measured."""
        if entry is None or against is None or entry not in self.result or against not in self.result:
            return None
        return speedup(self.result[against], self.result[entry])

    def entry_faster(self, entry: str | None, against: str | None) -> bool:
        """Whether an entry certainly beats another: a tie, a doubt or a missing time is a no."""
        ratio = self.entry_ratio(entry, against)
        return ratio is not None and decide(ratio, MARGIN) is Decision.FASTER

    def faster(self, name: str, against: str = ORIGINAL) -> bool:
        """Whether what stands for a variant certainly beats what stands for another."""
        return self.entry_faster(self.entry(name), self.entry(against))

    def subject(self, name: str) -> Subject:
        """What stands for a measured variant; KeyError for one that was not."""
        return self.subjects[self.entry(name) or name]

    def latency(self, name: str) -> Interval | None:
        """Latency of what stands for a variant, seconds."""
        entry = self.entry(name)
        return None if entry is None else self.result[entry].latency_s()


def run_finals(session: Session, variants: Sequence[Variant], rivals: bool, rules: Rules) -> Finals:
    """Build every variant for the asked runtimes and race them; the original comes first.

    What cannot be built, or is not installed, is left out with a note. With `rivals`, ONNX Runtime on the untouched
    model (fp32 and dynamic int8) and on the variants takes part, and every engine that was asked for.
    """
    here, asked = not session.target.remote, session.options.runtime
    entrants = Entrants(session)
    if not here:
        entrants.notes.append("ONNX Runtime was not timed: it is not on the device")
    for variant in variants if asked in (TVM, "auto") else ():
        entrants.enter(variant.name, session.engine, variant)
    if here and (rivals or asked != TVM or ORIGINAL not in entrants.subjects):
        for variant in variants:
            entrants.enter_in(_ONNXRUNTIME, variant)
    if here and rivals:
        entrants.enter_in(BY_KEY["onnxruntime-int8"], variants[0])
    if here and (rivals or asked not in (TVM, "auto")):
        _enter_others(session, entrants, variants, rivals)
    subjects = entrants.subjects
    if not subjects:
        why = entrants.notes[-1] if entrants.notes else "nothing was entered"
        raise ModelError(f"nothing could be built, so nothing can be timed: {why}", "Mend that, and run again")
    rules = replace(rules, budget_s=rules.budget_s * max(1.0, len(subjects) / _USUAL_ENTRIES))
    result = _raced(session, subjects, rules)
    entrants.notes += [f"{name} failed while being timed: {failure}" for name, failure in result.failures.items()]
    entrants.notes += result.retries
    session.variants_timed += len(result)
    return Finals(result, subjects, asked, entrants.notes)


def _enter_others(session: Session, entrants: Entrants, variants: Sequence[Variant], rivals: bool) -> None:
    """Engines besides TVM and ONNX Runtime that were asked for; those that round only where they can be judged."""
    engines = [
        engine for engine in asked_peers(session.options.runtime)
        if engine is not _ONNXRUNTIME and (rivals or not engine.rounds)
    ]  # fmt: skip
    present = []
    for engine in engines:
        why = absent(session, engine)
        if why is None and entrants.enter_in(engine, variants[0]):
            present.append(engine)
        elif why is not None:
            entrants.notes.append(f"{engine.key} took no part: {why}")
    if len(variants) > 1 and len(present) > 1:
        present = _hopeful(session, entrants, present)
    for engine in present:
        for variant in variants[1:]:
            entrants.enter_in(engine, variant)


def _hopeful(session: Session, entrants: Entrants, engines: Sequence[Engine]) -> list[Engine]:
    """The engines that may win with a variant, by a short race of the original in all of them.

    Building every variant for everybody takes minutes. One that rounds must at least beat those that do not.
    """
    heat = {name: one for name, one in entrants.subjects.items() if name == ORIGINAL or name in entrants.originals}
    result = _raced(session, heat, _HEAT)
    times_s = {name: result[name].latency_s().median for name in result}
    own = [
        seconds for name, seconds in times_s.items() if not (found := entrants.originals.get(name)) or not found.rounds
    ]
    for name, failure in result.failures.items():
        entrants.drop(name, f"{name} failed while being timed: {failure}")
    kept = []
    for engine in engines:
        seconds = times_s.get(entry_name(ORIGINAL, engine.key))
        if seconds is None or not own:
            continue
        times = seconds / min(own)
        if times <= (1.0 if engine.rounds else _HOPELESS):
            kept.append(engine)
        else:
            entrants.notes.append(
                f"{engine.key} ran the original alone: it took {times:.1f} times as long as the fastest"
            )
    return kept


def _raced(session: Session, subjects: dict[str, Subject], rules: Rules) -> RaceResult:
    def report(state: Progress) -> None:
        session.progress.advance(min(1.0, state.elapsed_s / rules.budget_s))

    threads = session.target.threads
    with Worker("device", threads) as shared:
        here = not session.target.remote
        apart = None if here else lambda one: WorkerBench(one, threads, (), rules.timeout_s, shared)
        return race(list(subjects.values()), threads=threads, rules=rules, progress=report, open_bench=apart)
