"""What is kept: the fastest variant that certainly beats the original and is certainly good enough, or the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rewriter.assembly.plan_file import restore
from rewriter.core.measurement import Interval
from rewriter.core.option import Plan
from rewriter.core.site import Site
from rewriter.measurement.race import Rules
from rewriter.search.asked import ASKED, asked_sizes, assemble_asked
from rewriter.search.candidates import exact_options
from rewriter.search.certification import Candidate, Certified, certify_front, worthy
from rewriter.search.engines import BY_KEY
from rewriter.search.entrants import entry_name
from rewriter.search.finals import ORIGINAL, RIVAL, RIVAL_INT8, Finals, run_finals, under_onnxruntime
from rewriter.search.forms import with_forms
from rewriter.search.problem import Options
from rewriter.search.refine import Trial
from rewriter.search.rounding import rounded_candidates, undominated
from rewriter.search.run import Search, search
from rewriter.search.scoring import Scorer
from rewriter.search.session import Session
from rewriter.search.variant import Variant, apply_exact, merge

EXACT = "exact"

_FINALISTS = {"quick": 1, "normal": 2, "thorough": 4}
_RACE_S = {"quick": 12.0, "normal": 20.0, "thorough": 120.0}
_FIRST_LOOK_S = 4.0


@dataclass(frozen=True)
class Outcome:
    """What was decided and everything the report says about how."""

    kept: Variant
    original: Variant
    finals: Finals
    trials: tuple[Trial, ...] = ()
    verdicts: tuple[Certified, ...] = ()
    outcomes: Mapping[str, str] = field(default_factory=dict)
    search: Search | None = None
    scorer: Scorer | None = None
    exact: Mapping[str, Options] = field(default_factory=dict)
    interrupted: bool = False
    shipped: str | None = None

    @property
    def entry(self) -> str | None:
        """The entry of the finals that is kept: `shipped` where that was certified, else what stands for `kept`."""
        return self.shipped or self.finals.entry(self.kept.name)

    @property
    def kept_original(self) -> bool:
        """Whether the original won, in the numbers it has."""
        return self.kept.name == ORIGINAL and self.shipped is None

    @property
    def verdict(self) -> Certified | None:
        """The verdict about what is kept, if it needed one."""
        return next((v for v in self.verdicts if v.candidate.shipped.name == self.entry), None)

    def cut_short(self) -> Outcome:
        """The same outcome, reached because the run was interrupted."""
        return replace(self, interrupted=True)


def original_variant(session: Session) -> Variant:
    """The model as it is, its attentions written in the form that the runtime likes."""
    return Variant.of(ORIGINAL, session.graph, Plan(), session.lowerable)


def exact_only(session: Session) -> Outcome:
    """The exact variant against the original: the best there is without data, and the floor with it."""
    original = original_variant(session)
    exact = exact_options(session.recognition, session.selection, session.target)
    sites = apply_exact(session.lowerable, exact, session.selection.passes)
    plan = merge(exact, Plan(), [site.id for site in session.recognition.sites])
    alone = session.splits is None
    with session.progress.stage(
        "exact", "building and timing the exact variant" + (" and its rivals" if alone else "")
    ):
        exact_one = with_forms(session, Variant.of(EXACT, session.graph, plan, sites))
        # A form of ONNX Runtime alone makes no other variant under TVM.
        nothing = plan.empty and (exact_one.plan.empty or session.options.runtime == "tvm")
        variants = [original] + ([] if nothing else [exact_one])
        seconds = _RACE_S[session.options.effort] if alone else _FIRST_LOOK_S
        # A first look for whoever interrupts the search; the finals decide, on processes started several times.
        rules = Rules(budget_s=seconds, most_rounds=60, reopen_every=6 if alone else 60)
        finals = run_finals(session, variants, rivals=alone, rules=rules)
    kept = next((v for v in variants[1:] if finals.faster(v.name)), original)
    session.notes += finals.notes
    outcomes = {v.name: "kept" if v is kept else "not certainly faster than the original" for v in variants[1:]}
    return Outcome(kept, original, finals, outcomes=outcomes, exact=exact)


def with_data(session: Session, so_far: Outcome) -> Search:
    """Search among calibrated rewrites on top of the exact ones."""
    assert session.splits is not None
    with session.progress.stage("reference", "running the original on calibration and selection samples"):
        scorer = Scorer.fit(session)
        session.progress.advance(1.0, f"metric {scorer.metric.name} ({scorer.metric.why})")
    sites = apply_exact(session.lowerable, so_far.exact, session.selection.passes)
    asked = asked_sizes(session)
    if asked is not None:
        return assemble_asked(session, scorer, sites, so_far.exact, asked)
    return search(session, scorer, sites, so_far.exact)


def decide_between(session: Session, so_far: Outcome, found: Search) -> Outcome:
    """Race the best trials against the original and their rivals, certify, and keep the fastest that holds."""
    with session.progress.stage("forms", "comparing the forms of attention in ONNX Runtime"):
        finalists = [with_forms(session, variant) for variant in _finalists(session, found)]
    exact = [so_far.kept] if not so_far.kept_original else []
    with session.progress.stage("finals", f"racing {len(finalists)} variants, the original and ONNX Runtime, in turn"):
        rules = Rules(budget_s=_RACE_S[session.options.effort], most_rounds=100)
        finals = run_finals(session, [so_far.original, *exact, *finalists], rivals=True, rules=rules)
    session.notes += finals.notes
    outcomes = _trial_outcomes(found, finalists)
    # An interval that reaches below the exact variant's time is a doubt, and the exact variant needs no certificate.
    floor = exact[0].name if exact and finals.faster(exact[0].name) else ORIGINAL
    worth = [v for v in finalists if finals.faster(v.name) and (floor == ORIGINAL or finals.faster(v.name, floor))]
    worth += [v for v in finalists if v.name == ASKED and v not in worth]
    outcomes |= {v.name: "not certainly faster" for v in finalists if v not in worth}
    base = replace(
        so_far, finals=finals, trials=tuple(found.trials), search=found, scorer=found.scorer, outcomes=outcomes,
        kept=exact[0] if floor != ORIGINAL else so_far.original,
    )  # fmt: skip
    rounded, why = rounded_candidates(session, found.scorer, finals, [so_far.original, *exact, *finalists], floor)
    base = replace(base, outcomes=outcomes | why)
    return _certified(session, base, found, worth, rounded) if worth or rounded else base


def _certified(
    session: Session, base: Outcome, found: Search, worth: Sequence[Variant], rounded: Sequence[Candidate]
) -> Outcome:
    finals = base.finals
    candidates = [
        Candidate(v, finals.subject(v.name), latency.median, found.paired[v.name])
        for v in worth
        if (latency := finals.latency(v.name)) is not None
    ]
    hopeful = undominated(finals, candidates, rounded)
    candidates += hopeful
    try:
        with session.progress.stage("proof", f"certifying up to {len(candidates)} variants on data that chose nothing"):
            verdicts = certify_front(session, found.scorer, candidates)
    except KeyboardInterrupt:
        return base.cut_short()
    outcomes = dict(base.outcomes)
    outcomes |= {c.shipped.name: "another is faster and loses no more" for c in rounded}
    outcomes |= {_label(finals, c): "not brought to certification" for c in candidates}
    outcomes |= {_label(finals, v.candidate): v.verdict.reason for v in verdicts}
    passed = [v.candidate for v in verdicts if v.verdict.certified]
    if not passed:
        return replace(base, verdicts=tuple(verdicts), outcomes=outcomes)
    kept = min(passed, key=lambda c: c.latency_s)
    outcomes |= {_label(finals, kept): "kept"}
    shipped = kept.shipped.name if any(one is kept for one in hopeful) else None
    return replace(base, kept=kept.variant, verdicts=tuple(verdicts), outcomes=outcomes, shipped=shipped)


def _label(finals: Finals, candidate: Candidate) -> str:
    """The variant's name, or that of an entry that stands for itself."""
    own = candidate.shipped.name == finals.entry(candidate.variant.name)
    return candidate.variant.name if own else candidate.shipped.name


def _finalists(session: Session, found: Search) -> list[Variant]:
    """The fastest-looking trials that the certification split has a fair chance to confirm."""
    certifiable = (
        t
        for t in found.trials
        if t.passes(found.budget) and worthy(session, found.scorer, t.name, found.paired[t.name])
    )
    passing = sorted(certifiable, key=lambda t: -t.saved_s)
    return [found.variants[t.name] for t in passing[: _FINALISTS[session.options.effort]]]


def _trial_outcomes(found: Search, finalists: Sequence[Variant]) -> dict[str, str]:
    names = {variant.name for variant in finalists}
    return {
        trial.name: "raced" if trial.name in names
        else "within the budget, but another looked faster" if trial.passes(found.budget)
        else "lost too much on the selection split"
        for trial in found.trials
    }  # fmt: skip


def replay(session: Session, plan_file: Path) -> Outcome:
    """Rebuild the variant of a plan without searching, and time it."""
    plan, sites = restore(session.graph, session.recognition.sites, plan_file)
    original = original_variant(session)
    rewritten: list[Site] = [sites.get(site.id, site) for site in session.lowerable]
    variant = Variant.of("plan", session.graph, plan, rewritten)
    with session.progress.stage("finals", "timing the plan's variant beside the original and ONNX Runtime"):
        rules = Rules(budget_s=_RACE_S[session.options.effort], most_rounds=100)
        finals = run_finals(session, [original, variant], rivals=True, rules=rules)
    session.notes.append("rebuilt from a plan: speed was measured here, quality was not; optimize verify does that")
    # The user asked for this very graph: it is written even if it is slow here, and the report says so.
    return Outcome(variant, original, finals, outcomes={"plan": "rebuilt as asked"})


def speedups(outcome: Outcome) -> dict[str, dict[str, Interval | None]]:
    """Per artifact: how much faster it is than the original in its runtime, and than ONNX Runtime on the original."""
    name, onnx_name = outcome.kept.name, under_onnxruntime(outcome.kept.name)
    finals = outcome.finals

    def row(entry: str, original: str) -> dict[str, Interval | None]:
        against = {"original": original, "onnxruntime": RIVAL, "onnxruntime_int8": RIVAL_INT8}
        return {key: finals.entry_ratio(entry, rival) for key, rival in against.items()}

    rows = {"model.so": row(name, ORIGINAL), "model.onnx": row(onnx_name, RIVAL)}
    engine = BY_KEY.get(finals.engine(outcome.entry)) if outcome.entry is not None else None
    if engine is None or engine.path in rows:
        return rows
    return rows | {engine.path: row(str(outcome.entry), entry_name(ORIGINAL, engine.key))}
