"""How fast the artifact is over the lengths that come, beside engines that take any length."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rewriter.core.errors import UserError
from rewriter.core.options import Effort
from rewriter.measurement.bench import Subject, WorkerBench
from rewriter.measurement.mix import RULES, mix_subject, save_requests
from rewriter.measurement.race import Progress, race
from rewriter.runtimes.workers import Worker
from rewriter.search.decision import Outcome
from rewriter.search.engines import ONE_SHAPE
from rewriter.search.finals import ORIGINAL
from rewriter.search.lengths import Served, build_sizes
from rewriter.search.session import Session

logger = logging.getLogger("rewriter")

ARTIFACT = "model.so"
_REQUESTS: Mapping[Effort, int] = {"quick": 12, "normal": 24, "thorough": 64}
_RACE_S: Mapping[Effort, float] = {"quick": 5.0, "normal": 20.0, "thorough": 90.0}


def race_lengths(session: Session, outcome: Outcome, served: Served) -> Served:
    """Passes over a sample of requests, in turn with everybody who took part in the finals."""
    if len(served.traffic.requests.counts) < 2 or served.exact or outcome.kept.caches:
        return served
    with session.progress.stage("requests", "timing requests of all lengths, beside engines that take any length"):
        return _raced(session, outcome, served)


def _raced(session: Session, outcome: Outcome, served: Served) -> Served:
    requests, options = served.traffic.requests, session.options
    count = _REQUESTS[options.effort]
    paths = save_requests(requests, count, served.traffic.make, session.folder / "requests", options.seed)
    subjects = _subjects(session, outcome, served, paths)
    if len(subjects) < 2:
        return served
    budget_s = _RACE_S[options.effort]
    rules = replace(RULES, budget_s=budget_s, reopen_every=0 if options.effort == "quick" else RULES.reopen_every)

    def report(state: Progress) -> None:
        session.progress.advance(min(1.0, state.elapsed_s / budget_s))

    threads = session.target.threads
    with Worker("device", threads) as shared:
        apart = None
        if session.target.remote:
            apart = lambda one: WorkerBench(one, threads, (), rules.timeout_s, shared)  # noqa: E731
        result = race(subjects, threads=threads, rules=rules, progress=report, open_bench=apart)
    for name, failure in result.failures.items():
        session.notes.append(f"{name} took no part in the race over lengths: {failure}")
    session.notes += result.retries
    session.variants_timed += len(result)
    return replace(served, race=result, sampled=count)


def _subjects(session: Session, outcome: Outcome, served: Served, paths: Sequence[Path]) -> list[Subject]:
    """What is kept, the original in the same runtime and sizes, and runtimes with dynamic shapes on both graphs."""
    subjects = []
    if served.artifact is not None:
        subjects.append(mix_subject(ARTIFACT, session.engine, served.artifact, paths))
    if not outcome.kept_original and (session.options.effort != "quick" or session.target.remote):
        try:
            built = build_sizes(session, outcome.original.graph, served.sizes, "served-original", session.engine)
            subjects.append(mix_subject(ORIGINAL, session.engine, built, paths))
        except UserError as problem:
            logger.info("the original takes no part in the race over lengths: %s", problem)
    for name, entrant in outcome.finals.subjects.items():
        label, _, engine = name.partition("@")
        either = not engine or label in (outcome.kept.name, ORIGINAL)
        # An engine with one shape would need a build for every length.
        dynamic = entrant.runtime != session.engine and entrant.runtime not in ONE_SHAPE
        if either and dynamic and name not in outcome.finals.result.failures:
            subjects.append(mix_subject(name, entrant.runtime, entrant.artifact, paths))
    return subjects
