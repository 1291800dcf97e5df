"""`optimize scan`: where the time goes, what each class of rewrite could gain, whether it is worth going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewriter.attention.lower import fragment
from rewriter.core.options import Options
from rewriter.core.progress import Listener, Progress, Silent
from rewriter.core.site import AttentionSite
from rewriter.measurement.race import Rules
from rewriter.search.candidates import all_candidates
from rewriter.search.cost import Priced
from rewriter.search.decision import original_variant
from rewriter.search.finals import ORIGINAL, RIVAL, RIVAL_INT8, Finals, run_finals
from rewriter.search.opening import open_session
from rewriter.search.problem import Options as Combination
from rewriter.search.run import cost_table, values_read
from rewriter.search.session import Session, default_cache, scratch
from rewriter.search.structure import blank_statistics, restructure

_RACE = Rules(budget_s=10.0, most_rounds=30)


def scan(model: Path, options: Options, listener: Listener | None = None) -> dict[str, Any]:
    """``{"parts": [...], "gains": [...], "rivals": [...], "advice": str}``. Raises `UserError` for bad input."""
    progress = Progress(listener or Silent())
    with (
        scratch(options.cache_dir or default_cache()) as place,
        open_session(model, options, progress, place) as session,
    ):
        finals = run_finals(session, [original_variant(session)], rivals=True, rules=_RACE)
        whole = finals.latency(ORIGINAL)
        if whole is None:
            return {
                "parts": [],
                "gains": [],
                "rivals": [],
                "advice": "; ".join(finals.notes) or "nothing could be timed",
            }
        spent_s = _by_kind(session)
        gains = _gains(session, whole.median, spent_s)
        return {
            "parts": _parts(whole.median, spent_s),
            "gains": gains,
            "rivals": _rivals(finals),
            "advice": _advice(whole.median, spent_s, gains, finals),
        }


def _by_kind(session: Session) -> dict[str, float]:
    """Seconds in all attentions and in all feed-forwards, by timing one of each shape in a chain."""
    sites = session.lowerable
    priced = [Priced(site, fragment(session.graph, site)) for site in sites]
    intervals = cost_table(session).latencies_s(session.graph, priced, values_read(session, sites, priced))
    spent = {"attention": 0.0, "feed-forward": 0.0}
    for site, interval in zip(sites, intervals, strict=True):
        spent["attention" if isinstance(site, AttentionSite) else "feed-forward"] += interval.median
    return spent


def _parts(whole_s: float, spent_s: dict[str, float]) -> list[dict[str, Any]]:
    rest = max(0.0, whole_s - sum(spent_s.values()))
    rows = {**spent_s, "the rest (embedding, pooling, calls)": rest}
    return [{"part": name, "latency_s": seconds, "share": seconds / whole_s} for name, seconds in rows.items()]


def _gains(session: Session, whole_s: float, spent_s: dict[str, float]) -> list[dict[str, Any]]:
    """Amdahl bounds for removing a kind of block, and what the strongest single option of each pass would save here."""
    rows = [
        {
            "rewrite": f"everything in {kind}",
            "at_most": whole_s / max(whole_s - seconds, 1e-3 * whole_s),
            "why": "if it cost nothing at all",
        }
        for kind, seconds in spent_s.items()
    ]
    for name, option_saves_s in _strongest(session).items():
        at_most = whole_s / max(whole_s - option_saves_s, 1e-3 * whole_s)
        rows.append(
            {"rewrite": name, "at_most": at_most, "why": "its strongest option at every site, quality not looked at"}
        )
    return rows


def _strongest(session: Session) -> dict[str, float]:
    """Seconds saved by each calibrated pass if its strongest level were taken everywhere."""
    found = all_candidates(session.recognition, session.selection, session.target, "quick")
    table, sites = cost_table(session), {site.id: site for site in session.lowerable}
    saved: dict[str, float] = {}
    wanted: list[tuple[str, Priced]] = []
    for name, combinations in found.items():
        blank = blank_statistics(sites[name])
        for pass_name in session.selection.passes:
            alone: list[Combination] = [c for c in combinations if len(c) == 1 and c[0].name == pass_name]
            for options in ((), *alone[-1:]) if alone else ():
                site = restructure(sites[name], options, session.selection.passes, blank)
                wanted.append((pass_name if options else "", Priced(site, fragment(session.graph, site))))
    values = values_read(session, session.lowerable, [priced for _, priced in wanted])
    intervals = table.latencies_s(session.graph, [priced for _, priced in wanted], values)
    for (_, before), (pass_name, after) in zip(
        zip([n for n, _ in wanted[::2]], intervals[::2], strict=True),
        zip([n for n, _ in wanted[1::2]], intervals[1::2], strict=True),
        strict=True,
    ):
        saved[pass_name] = saved.get(pass_name, 0.0) + max(0.0, before.median - after.median)
    return saved


def _rivals(finals: Finals) -> list[dict[str, Any]]:
    rows = []
    for entry in (ORIGINAL, RIVAL, RIVAL_INT8):
        if entry in finals.result:
            rows.append({"entry": entry, "latency_s": finals.result[entry].latency_s().as_dict()})
    return rows


def _advice(whole_s: float, spent_s: dict[str, float], gains: list[dict[str, Any]], finals: Finals) -> str:
    ratio = finals.entry_ratio(finals.entry(ORIGINAL), RIVAL)
    same = "" if ratio is None else f"{ratio.median:.2f}x as fast under TVM as under ONNX Runtime. "
    head = f"As it is, the model runs {same}" if same else ""
    share = sum(spent_s.values()) / whole_s
    if share < 0.1:
        return (
            head
            + f"Attention and feed-forward take {100 * share:.0f} % of the time: rewriting them is hardly worth it."
        )
    named = [row for row in gains if not row["rewrite"].startswith("everything")]
    best = max(named, key=lambda row: row["at_most"], default=None)
    if best is None:
        return head + "No calibrated rewrite applies: see optimize inspect."
    return head + (
        f"Attention and feed-forward take {100 * share:.0f} % of the time; {best['rewrite']} alone could give up to "
        f"{best['at_most']:.1f}x. Worth going on: optimize MODEL --data DATA."
    )
