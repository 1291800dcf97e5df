"""The proof: candidates run as they would be shipped on the split that chose nothing, from safest to fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rewriter.accuracy.certificate import Verdict, certify, foresee
from rewriter.accuracy.ledger import Ledger
from rewriter.accuracy.paired import Paired
from rewriter.calibration.data import Dataset
from rewriter.core.options import Effort
from rewriter.measurement.bench import Subject
from rewriter.runtimes.retry import call_twice
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.caches import converted_data
from rewriter.search.scoring import Outputs, Scorer, reference_outputs, run_artifact, spread, token_mask
from rewriter.search.session import Session
from rewriter.search.variant import Variant

_SECONDS: Mapping[Effort, float] = {"quick": 20.0, "normal": 30.0, "thorough": 600.0}
_FEWEST, _MOST = 200, {"quick": 1000, "normal": 2000, "thorough": 100_000}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """A variant as it would be shipped, how long one sample takes, and its values on the selection split."""

    variant: Variant
    shipped: Subject
    latency_s: float
    selected: Paired


@dataclass(frozen=True)
class Certified:
    """The verdict about one candidate, and the labelled task beside it."""

    candidate: Candidate
    verdict: Verdict
    task: Verdict | None


def certify_front(session: Session, scorer: Scorer, candidates: Sequence[Candidate]) -> list[Certified]:
    """Verdicts from the safest candidate to the fastest, stopping at the first that fails.

    Fixed-sequence testing: each is tested at the full level, because it is reached only if all before it passed.
    The split is opened for the whole sequence at once, which the ledger records. Candidates without a real chance
    (see `worthy`) should not be brought before it.
    """
    assert session.splits is not None
    data = _samples(session, scorer, max(c.latency_s for c in candidates))
    ordered = sorted(candidates, key=lambda c: (c.selected.drop, c.latency_s))
    ledger, key = Ledger(session.cache / "ledger"), session.splits.certify.content_hash()
    opening = ledger.open(key, _subject(ordered), CONFIDENCE)
    session.notes += [opening.sentence] if opening.ordinal > 1 else []
    verdicts = []
    with ThreadPoolExecutor(1) as beside:
        # The original runs here while the first candidate runs in its worker, on another core if there is one.
        reference = beside.submit(reference_outputs, session, data, scorer.crop)
        first = _run_shipped(session, ordered[0], data)
        original = reference.result()
    for index, candidate in enumerate(ordered):
        shipped = first if index == 0 else _run_shipped(session, candidate, data)
        if isinstance(shipped, WorkerFailure):
            session.notes.append(f"{candidate.variant.name} failed while being certified: {shipped}")
            break
        verdicts.append(_judge(session, scorer, candidate, data, original, shipped, opening.confidence))
        session.progress.advance((index + 1) / len(ordered), verdicts[-1].verdict.reason)
        if not verdicts[-1].verdict.certified:
            break
    return verdicts


def _samples(session: Session, scorer: Scorer, latency_s: float) -> Dataset:
    """As many certification samples as fit the time, drawn without looking at them."""
    assert session.splits is not None
    data = session.splits.certify.labelled() if scorer.metric.needs_labels else session.splits.certify
    room = max(_FEWEST, int(_SECONDS[session.options.effort] / max(latency_s, 1e-6)))
    return spread(data, min(room, _MOST[session.options.effort]), session.options.seed)


def _subject(candidates: Sequence[Candidate]) -> str:
    return "+".join(candidate.variant.graph.fingerprint()[:16] for candidate in candidates)


def _items(data: Dataset) -> int:
    """Samples of one document count as one item."""
    return len(data) if data.group is None else len(np.unique(data.group))


def worthy(session: Session, scorer: Scorer, name: str, selected: Paired) -> bool:
    """Whether a variant with these values on the selection split has a real chance to be certified; a note if not.

    Forecast with the confidence that the ledger leaves for one more look, and for as many documents as there are.
    """
    assert session.splits is not None
    data = session.splits.certify.labelled() if scorer.metric.needs_labels else session.splits.certify
    n = min(_items(data), _MOST[session.options.effort])
    ledger, key = Ledger(session.cache / "ledger"), session.splits.certify.content_hash()
    left = ledger.foresee(key, name, CONFIDENCE).confidence
    forecast = foresee(selected, n, session.options.max_drop, left, scorer.data.group)
    if not forecast.worth_opening:
        session.notes.append(f"{name}: {forecast.sentence}")
    return forecast.worth_opening


def _run_shipped(session: Session, candidate: Candidate, data: Dataset) -> Outputs | WorkerFailure:
    limit_s = 60.0 + 20.0 * candidate.latency_s * len(data)
    with Worker("certify", session.target.threads) as worker:
        answer: Outputs | WorkerFailure = call_twice(
            worker,
            f"{run_artifact.__module__}:run_artifact",
            candidate.shipped.runtime,
            candidate.shipped.artifact,
            session.target.threads,
            converted_data(data, candidate.variant.caches),
            1,
            False,
            timeout_s=limit_s,
            told=session.notes.append,
        )
    return answer


def _judge(
    session: Session,
    scorer: Scorer,
    candidate: Candidate,
    data: Dataset,
    original: Outputs,
    shipped: Outputs,
    level: float,
) -> Certified:
    paired = scorer.metric.paired(original, shipped, data.labels, token_mask(data))
    verdict = certify(paired, session.options.max_drop, level, data.group)
    task = None
    if scorer.task is not None and data.labels is not None and (data.labels >= 0).any():
        known = np.flatnonzero(data.labels >= 0)
        before, after = ({name: array[known] for name, array in outputs.items()} for outputs in (original, shipped))
        beside = scorer.task.paired(before, after, data.labels[known])
        task = certify(beside, session.options.max_drop, level, None if data.group is None else data.group[known])
    return Certified(candidate, verdict, task)
