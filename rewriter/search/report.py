"""report.json from an outcome: the truth that everything else is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rewriter.accuracy.certificate import Verdict
from rewriter.attention.flops import TOKENS, total
from rewriter.core.measurement import Interval
from rewriter.core.site import AttentionSite, FeedForwardSite, LinearSite, Site
from rewriter.measurement import environment
from rewriter.search.caches import cache_report
from rewriter.search.decision import Outcome, speedups
from rewriter.search.finals import ORIGINAL
from rewriter.search.forms_report import forms_entry, forms_of, priced_by_tvm
from rewriter.search.lengths import Served
from rewriter.search.lengths_report import lengths_entry
from rewriter.search.runtime_rows import kept_artifact, loading, runtime_rows
from rewriter.search.session import Session
from rewriter.search.variant import Variant

# A pass for the other kind of site is no refusal worth reading.
_WRONG_KIND = ("not-attention", "not-feed-forward")


def build_report(session: Session, outcome: Outcome, served: Served | None = None) -> dict[str, Any]:
    """Everything of report.json; see rewriter/report/schema.json."""
    return {
        "format": 1,
        "model": _model(session),
        "target": session.target.key(),
        "shapes": {name: list(shape) for name, shape in session.workload.shapes.items()},
        "baseline": _subject(session, outcome, outcome.original, outcome.finals.entry(ORIGINAL)),
        "best": _subject(session, outcome, outcome.kept, outcome.entry) | _decision(outcome),
        "speedup": {
            artifact: {name: _interval(value) for name, value in rivals.items()}
            for artifact, rivals in speedups(outcome).items()
        },
        "runtimes": runtime_rows(session, outcome),
        "lengths": None if served is None else lengths_entry(served),
        "metric": _metric(outcome),
        "task": _task(outcome),
        "caches": cache_report(session.graph, session.recognition.sites, outcome.kept.sites),
        "forms": forms_entry(session, outcome.kept.name),
        "sites": [_site(session, outcome, site) for site in session.recognition.sites],
        "contributions": contributions(outcome),
        "variants": _variants(outcome),
        "variants_timed": session.variants_timed,
        "seconds": {name: round(seconds, 2) for name, seconds in session.progress.seconds.items()},
        "environment": dict(environment.describe(session.target.threads)),
        "notes": list(session.notes),
        "interrupted": outcome.interrupted,
    }


def _model(session: Session) -> dict[str, Any]:
    graph = session.graph
    return {
        "path": str(graph.path),
        "fingerprint": graph.fingerprint(),
        "opset": graph.opset,
        "inputs": [str(spec) for spec in graph.inputs],
        "outputs": [str(spec) for spec in graph.outputs],
    }


def _interval(value: Interval | None) -> dict[str, float] | None:
    return None if value is None else value.as_dict()


def _subject(session: Session, outcome: Outcome, variant: Variant, entry: str | None) -> dict[str, Any]:
    finals = outcome.finals
    return {
        "latency_s": _interval(None if entry is None else finals.result[entry].latency_s()),
        "runtime": "not measured" if entry is None else finals.engine(entry),
        "parameters": parameters(variant),
        "flops": total(variant.sites.values(), *_batch_and_tokens(session)).flops,
    }


def _batch_and_tokens(session: Session) -> tuple[int, int]:
    """Of the timed shapes: the first input with a token axis says."""
    shape = max(session.workload.shapes.values(), key=lambda shape: (len(shape) == 2, len(shape)))
    return shape[0], shape[1] if len(shape) == 2 else TOKENS


def parameters(variant: Variant) -> int:
    """Elements of all floating-point weights."""
    arrays = (value.const_value for value in variant.graph.constants.values())
    return sum(int(a.size) for a in arrays if a is not None and a.dtype.is_floating_point())


def _decision(outcome: Outcome) -> dict[str, Any]:
    return {
        "kept_original": outcome.kept_original,
        "plan": [str(option) for option in outcome.kept.plan.options],
        "artifact": kept_artifact(outcome),
        "load": loading(outcome),
    }


def _metric(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.verdict is not None:
        return _verdict(outcome.verdict.verdict)
    if outcome.scorer is None:
        return None
    metric = outcome.scorer.metric
    best = metric.high if metric.higher_is_better else metric.low
    why = "what is kept is exact, or the original itself; nothing had to be certified"
    return {
        "name": metric.name, "baseline": best, "best": best, "drop": {"median": 0.0, "low": 0.0, "high": 0.0},
        "max_drop": "0%", "certified": False, "confidence": 0.0, "n": 0, "reason": why,
    }  # fmt: skip


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.metric,
        "baseline": verdict.baseline,
        "best": verdict.best,
        "drop": {"median": verdict.drop, "low": verdict.drop_low, "high": verdict.drop_high},
        "max_drop": verdict.max_drop,
        "certified": verdict.certified,
        "confidence": verdict.confidence,
        "n": verdict.n,
        "samples": verdict.samples,
        "bound": verdict.bound,
        "method": verdict.method,
        "reason": verdict.reason,
    }


def _task(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.verdict is None or outcome.verdict.task is None:
        return None
    return _verdict(outcome.verdict.task)


def _site(session: Session, outcome: Outcome, site: Site) -> dict[str, Any]:
    refused = {name: one.refuse(site) for name, one in session.selection.passes.items()}
    facts: dict[str, Any] = {
        "id": site.id,
        "kind": "feed_forward" if isinstance(site, FeedForwardSite) else "attention",
        "state": site.state.value,
        "chosen": [str(option) for option in outcome.kept.plan.at(site.id)],
        "refusals": {name: str(r) for name, r in refused.items() if r is not None and r.code not in _WRONG_KIND},
    }
    if isinstance(site, AttentionSite):
        facts["forms"] = forms_of(outcome.kept.sites.get(site.id))
        return facts | {"heads": site.heads, "kv_heads": site.kv_heads, "head_dim": site.qk_dim}
    if isinstance(site, LinearSite):
        return facts | {"features": site.features}
    return facts | {"width": site.width}


def contributions(outcome: Outcome) -> list[dict[str, Any]]:
    """The predicted seconds that each class of rewrite saves, and its share of the predicted saving.

    Where several rewrites meet at one site, what they save together is split by their share of what they save alone.
    """
    found: dict[str, float] = {}
    if outcome.search is not None and outcome.search.problem is not None and not outcome.kept_original:
        found = _by_pass(outcome)
    exact = _exact_gain_s(outcome)
    if exact is not None:
        found = {"exact rewrites": exact, **found}
    total = sum(abs(gain) for gain in found.values()) or 1.0
    return [{"rewrite": name, "gain_s": gain, "share": gain / total} for name, gain in found.items()]


def _exact_gain_s(outcome: Outcome) -> float | None:
    before, after = (outcome.finals.latency(name) for name in (ORIGINAL, "exact"))
    return None if before is None or after is None else before.median - after.median


def _by_pass(outcome: Outcome) -> dict[str, float]:
    assert outcome.search is not None and outcome.search.problem is not None
    found: dict[str, float] = {}
    for site, choices in outcome.search.problem.sites.items():
        exact = len(outcome.exact.get(site, ()))
        options = tuple(option for option in outcome.kept.plan.at(site)[exact:] if priced_by_tvm(option))
        chosen = next((choice for choice in choices if choice.options == options), None)
        if chosen is None or not options:
            continue
        saved = choices[0].latency_s - chosen.latency_s
        alone = {o.name: max(_saved_alone(outcome, site, o.name, options), 1e-12) for o in options}
        for name, share in alone.items():
            found[name] = found.get(name, 0.0) + saved * share / sum(alone.values())
    return found


def _saved_alone(outcome: Outcome, site: str, name: str, options: tuple[Any, ...]) -> float:
    assert outcome.search is not None
    latencies: Mapping[Any, float] = outcome.search.latencies_s.get(site, {})
    single = tuple(option for option in options if option.name == name)
    return latencies.get((), 0.0) - latencies.get(single, latencies.get((), 0.0))


def _variants(outcome: Outcome) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "plan": [], "outcome": text}
        for name, text in outcome.outcomes.items()
        if name in ("exact", "plan")
    ]
    for trial in outcome.trials:
        latency = outcome.finals.latency(trial.name)
        rows.append({
            "name": trial.name,
            "plan": [str(option) for option in trial.plan.options],
            "predicted_saving_s": trial.saved_s,
            "damage": trial.damage if np.isfinite(trial.damage) else None,
            "predicted_damage": trial.predicted,
            "latency_s": _interval(latency),
            "outcome": outcome.outcomes.get(trial.name, ""),
        })  # fmt: skip
    return rows
