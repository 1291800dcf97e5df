"""What the report says of the runtimes: who ran what how fast, what may be kept, and which artifact is the kept one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rewriter.search.decision import Outcome
from rewriter.search.engines import BY_KEY, Engine
from rewriter.search.finals import ORIGINAL, TVM
from rewriter.search.rounding import UNSCORED
from rewriter.search.session import Session

_OUR_BUILD = "model.so"


def kept_engine(outcome: Outcome) -> Engine | None:
    """The engine of what was kept; None for TVM, and where nothing was measured."""
    return None if outcome.entry is None else BY_KEY.get(outcome.finals.engine(outcome.entry))


def kept_artifact(outcome: Outcome) -> str:
    """The file of the output folder that was kept for its speed."""
    engine = kept_engine(outcome)
    return _OUR_BUILD if engine is None else engine.path


def loading(outcome: Outcome) -> str:
    """The line of Python that loads it from within the folder."""
    engine = kept_engine(outcome)
    return "model = rewriter.load('.')" if engine is None else engine.loading


def runtime_rows(session: Session, outcome: Outcome) -> list[dict[str, Any]]:
    """One row per graph and engine, the fastest first; empty where one runtime was asked for that is always there."""
    if session.options.runtime in (TVM, "onnxruntime"):
        return []
    return sorted(_rows(outcome), key=lambda row: row["latency_s"]["median"])


def _rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    finals = outcome.finals
    baseline = finals.entry(ORIGINAL)
    for entry, measured in finals.result.items():
        key = finals.engine(entry)
        engine = BY_KEY.get(key)
        variant = entry.partition("@")[0] if engine is None or "@" in entry else ORIGINAL
        ratio = finals.entry_ratio(entry, baseline)
        yield {
            "graph": variant,
            "runtime": key,
            "precision": "as the graph" if engine is None else engine.precision,
            "latency_s": measured.latency_s().as_dict(),
            "against_original": None if ratio is None else ratio.as_dict(),
            "outcome": "kept" if entry == outcome.entry else _outcome(outcome, entry, variant),
        }


def _outcome(outcome: Outcome, entry: str, variant: str) -> str:
    engine = BY_KEY.get(outcome.finals.engine(entry))
    if engine is not None and engine.rounds:
        return outcome.outcomes.get(entry, UNSCORED)
    if variant == ORIGINAL:
        return "the original"
    return "the same graph" if variant == outcome.kept.name else outcome.outcomes.get(variant, "")
