"""Engines that round what the graph computes: scored on the selection split as they would run, then candidates."""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.accuracy.paired import Paired
from rewriter.measurement.bench import Subject
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.certification import Candidate, worthy
from rewriter.search.finals import Finals
from rewriter.search.scoring import Scorer, run_artifact, token_mask
from rewriter.search.session import Session
from rewriter.search.variant import Variant

UNSCORED = "rounds numbers and was not scored, so it cannot be kept"


def rounded_candidates(
    session: Session, scorer: Scorer, finals: Finals, variants: Sequence[Variant], floor: str
) -> tuple[list[Candidate], dict[str, str]]:
    """Entries that certainly beat what stands for `floor` and may be certified; and why the others are none.

    Each is another model than the graph says, so each is run on the selection split like a rewrite.
    """
    candidates: list[Candidate] = []
    why: dict[str, str] = {}
    for variant in variants:
        for entry in finals.rounded(variant.name):
            if not finals.entry_faster(entry, finals.entry(floor)):
                why[entry] = "not certainly faster than what needs no rounding"
                continue
            latency_s = finals.result[entry].latency_s().median
            scored = _scored(session, scorer, finals.subjects[entry], latency_s)
            if isinstance(scored, WorkerFailure):
                why[entry] = f"failed while being scored: {scored}"
            elif not worthy(session, scorer, entry, scored):
                why[entry] = f"lost {100 * scored.drop:.3f} points on the selection split, too much to be certified"
            else:
                candidates.append(Candidate(variant, finals.subjects[entry], latency_s, scored))
                why[entry] = f"lost {100 * scored.drop:.3f} points on the selection split"
    return candidates, why


def undominated(finals: Finals, candidates: Sequence[Candidate], rounded: Sequence[Candidate]) -> list[Candidate]:
    """Those of `rounded` that no other candidate beats in time while losing no more."""
    return [
        one
        for one in rounded
        if not any(
            other.selected.drop <= one.selected.drop and finals.entry_faster(other.shipped.name, one.shipped.name)
            for other in (*candidates, *rounded)
            if other is not one
        )
    ]


def _scored(session: Session, scorer: Scorer, subject: Subject, latency_s: float) -> Paired | WorkerFailure:
    """The metric on the selection split, run one sample at a time as it would be served."""
    limit_s = 60.0 + 20.0 * latency_s * len(scorer.data)
    threads = session.target.threads
    with Worker("score", threads) as worker:
        arguments = (subject.runtime, subject.artifact, threads, scorer.data, 1, False)
        spec = f"{run_artifact.__module__}:run_artifact"
        outputs = worker.call(spec, *arguments, timeout_s=limit_s)
    if isinstance(outputs, WorkerFailure):
        return outputs
    return scorer.metric.paired(scorer.original, outputs, scorer.data.labels, token_mask(scorer.data))
