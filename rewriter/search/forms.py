"""The form of every attention under ONNX Runtime, chosen by time: what `model.onnx` is written in.

Sites that cost the same share a choice. Each form that can say what a site does is first compared with the one that is
written out (`form_check`); those that agree are priced in the cost table, in turn with it, as options
``fused_sdpa{form=...}``. At last the whole graph races itself written out, and a choice that does not certainly win
there is dropped: other fusions may be lost at another opset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.attention.lower import fragment
from rewriter.core.errors import UserError
from rewriter.core.forms import ATTENTION, ATTENTION_OPSET, DECOMPOSED, FORMS, FUSED_SDPA
from rewriter.core.measurement import Interval, bootstrap_median
from rewriter.core.option import Option, Plan
from rewriter.core.site import AttentionSite, State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.opset import at_least
from rewriter.measurement.bench import save_feeds
from rewriter.runtimes.standard import AS_CHOSEN, to_standard
from rewriter.search.caches import converted
from rewriter.search.chain import signature
from rewriter.search.cost import Priced
from rewriter.search.form_check import check_forms, hostile_values, one_copy, reads_of
from rewriter.search.form_prices import onnxruntime_table, timed
from rewriter.search.session import ONNXRUNTIME, Session
from rewriter.search.variant import Variant

_TIE = 0.01  # the first of forms that are this close is taken: standard operators before those of com.microsoft
_RACE_S = 8.0


@dataclass(frozen=True)
class TriedForm:
    """One form at sites that are alike: seconds of a sub-block, how many times faster than written out, or why not."""

    form: str
    sites: tuple[str, ...]
    latency_s: Interval | None = None
    ratio: float | None = None
    why_not: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class FormChoice:
    """What was tried for one variant, and the whole graph's ratio to itself written out, if a form was chosen."""

    tried: tuple[TriedForm, ...]
    ratio: Interval | None = None
    kept: bool = False


def with_forms(session: Session, variant: Variant) -> Variant:
    """The variant with the forms that are fastest under ONNX Runtime in its plan, or as it was.

    What was tried is left in ``session.forms`` under the variant's name. A failed measurement chooses nothing.
    """
    if FUSED_SDPA not in session.selection.passes or session.target.remote:
        return variant
    sites = [s for s in variant.sites.values() if isinstance(s, AttentionSite) and s.state is State.LOWERABLE]
    tried: list[TriedForm] = []
    try:
        for alike in _alike(session, variant, sites):
            tried += _tried(session, variant, alike)
    except UserError as problem:
        session.notes.append(f"forms of attention were not compared for {variant.name}: {problem}")
        return variant
    session.variants_timed += sum(one.latency_s is not None for one in tried)
    chosen = {site: one.form for one in tried if one.chosen and one.form != DECOMPOSED for site in one.sites}
    formed = _formed(session, variant, chosen) if chosen else variant
    ratio = _ratio(session, variant, formed) if chosen else None
    kept = ratio is not None and ratio.low > 1.0
    session.forms[variant.name] = FormChoice(tuple(tried), ratio, kept)
    return formed if kept else variant


def enumerated(session: Session, site: Any, runtime: str = "onnxruntime") -> tuple[Option, ...]:
    """The forms that a runtime has of those that could mean the same at a site, its own choice first."""
    one = session.selection.passes.get(FUSED_SDPA)
    offered = () if one is None else session.selection.options(one, site, session.target)
    by_form = {str(option["form"]): option for option in offered}
    return tuple(by_form[form] for form in FORMS[runtime] if form in by_form)


def _alike(session: Session, variant: Variant, sites: Sequence[AttentionSite]) -> list[list[Priced]]:
    """The sites in groups of equal price."""
    priced = [Priced(site, fragment(session.graph, site)) for site in sites]
    names = reads_of([one.piece for one in priced])
    values = _values(session, variant, names) if priced else {}
    groups: dict[str, list[Priced]] = {}
    for one in priced:
        read = {name: values[name] for name in one.piece.reads()}
        groups.setdefault(signature(one.site, one.piece, read), []).append(replace(one, own=read))
    return list(groups.values())


def _values(session: Session, variant: Variant, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    run = Interpreter(variant.graph).run(converted(session.workload.feeds[0], variant.caches), taps=names)
    return {name: run[name].numpy() for name in names}


def _tried(session: Session, variant: Variant, alike: Sequence[Priced]) -> list[TriedForm]:
    """Every form at one group of sites: checked, then priced beside the decomposed one."""
    first, ids = alike[0], tuple(one.site.id for one in alike)
    assert isinstance(first.site, AttentionSite)
    own = session.selection.passes[FUSED_SDPA]
    options = [option for option in enumerated(session, first.site) if option["form"] != DECOMPOSED]
    if not _reachable(session.graph):
        options = [option for option in options if option["form"] != ATTENTION]
    plain = replace(first.site, forms=(DECOMPOSED,))
    forms = {str(option["form"]): own.apply(first.site, option, None) for option in options}
    fitting, refused = _agreeing(session, variant, plain, forms)
    found = [TriedForm(form, ids, why_not=why) for form, why in refused.items()]
    pieces = [Priced(site, fragment(session.graph, site), first.own) for site in (plain, *fitting.values())]
    if not fitting:
        return found
    latencies = onnxruntime_table(session).latencies_s(session.graph, pieces, first.own)
    times = dict(zip((DECOMPOSED, *fitting), latencies, strict=True))
    best = _best({form: interval.median for form, interval in times.items()})
    return found + [
        TriedForm(form, ids, time, times[DECOMPOSED].median / time.median, chosen=form == best)
        for form, time in times.items()
        if np.isfinite(time.median)
    ]


def _best(times_s: Mapping[str, float]) -> str:
    limit = min(times_s.values()) * (1.0 + _TIE)
    return next(form for form in FORMS["onnxruntime"] if times_s.get(form, np.inf) <= limit)


def _reachable(graph: OnnxGraph) -> bool:
    """Whether the graph can be written at the opset of the `Attention` operator."""
    try:
        at_least(graph, ATTENTION_OPSET)
    except UserError:
        return False
    return True


def _agreeing(
    session: Session, variant: Variant, plain: AttentionSite, forms: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The sites by form whose form is the same function as the decomposed one, and why the others are not."""
    names = reads_of([fragment(session.graph, plain)])
    batches = hostile_values(session.graph, variant.graph, names, session.options.seed)
    if not batches:
        return {}, dict.fromkeys(forms, "no small inputs fit the model, so it could not be compared")
    written = {form: one_copy(session.graph, site, batches) for form, site in forms.items()}
    base = one_copy(session.graph, plain, batches)
    own = {form: graph for form, graph in written.items() if graph.fingerprint() != base.fingerprint()}
    refused = dict.fromkeys((form for form in forms if form not in own), "the operator cannot say what this site does")
    folder = session.folder / "forms"
    answers = check_forms([base, *own.values()], batches, session.builder, ONNXRUNTIME, folder)
    refused |= {form: why.why for form, why in zip(own, answers, strict=True) if why is not None}
    return {form: site for form, site in forms.items() if form not in refused}, refused


def _formed(session: Session, variant: Variant, chosen: Mapping[str, str]) -> Variant:
    """The variant with these forms at these sites, in its plan too."""
    own = session.selection.passes[FUSED_SDPA]
    options = {site: Option.of(FUSED_SDPA, site, form=form) for site, form in chosen.items()}
    sites = [own.apply(s, options[s.id], None) if s.id in options else s for s in variant.sites.values()]
    order = [site.id for site in session.recognition.sites]
    plan = {
        site: both
        for site in order
        if (both := (*variant.plan.at(site), *((options[site],) if site in options else ())))
    }
    return Variant.of(variant.name, session.graph, Plan(plan), sites)


def _ratio(session: Session, plain: Variant, formed: Variant) -> Interval | None:
    """How many times faster a whole graph is in its forms than written out; None if that could not be measured."""
    feeds = [converted(one, plain.caches) for one in session.workload.feeds[:1]]
    path = save_feeds(feeds, session.folder / f"forms-{plain.name}")[0]
    try:
        artifacts = [
            session.build(to_standard(one.graph, form), f"{plain.name}-{label}", ONNXRUNTIME)
            for one, form, label in ((plain, DECOMPOSED, "decomposed"), (formed, AS_CHOSEN, "formed"))
        ]
    except UserError as problem:
        session.notes.append(f"the forms of attention that were chosen do not run: {problem}")
        return None
    found = timed(session, artifacts, [path, path], _RACE_S)
    if found is None:
        return None
    before, after = (np.asarray(samples) for samples in found)
    return bootstrap_median((before / after).tolist())
