"""Records of works as a Markdown table: ratio with interval, goal, reached or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rewriter.benchmark.works import FASTEST, Goal, Work
from rewriter.report.markdown import cell, latency, ratio

Record = Mapping[str, Any]


def table(found: Iterable[tuple[Work, Record]], code: str) -> str:
    """One row per goal, then what the other ratios are, what took no part, and the machine."""
    records = list(found)
    lines = ["| work | threads | ours | against | their time | ratio | goal | reached |", "|" + " --- |" * 8]
    for work, record in records:
        lines += [_row(work, record, goal) for goal in work.goals]
    lines += ["", "All ratios, ours against each:", ""]
    for work, record in records:
        others = ", ".join(f"{name} {ratio(value)}" for name, value in record["ratios"].items())
        lines.append(f"- {work.name}, {record['threads']} thread(s), {record['rounds']} rounds: {others or 'none'}")
        lines += [f"  - {name} took no part: {cell(why)}" for name, why in record["refused"].items()]
    if any(record["code"] != code for _, record in records):
        lines += ["", "Some records were made by other sources than these: --again makes them anew."]
    environment = records[-1][1]["environment"] if records else {}
    lines += ["", *[f"- {name}: {cell(value)}" for name, value in environment.items()]]
    return "\n".join(lines)


def _row(work: Work, record: Record, goal: Goal) -> str:
    times, own = record["latency_s"], work.entrants[0].name
    rival = _fastest(work, record) if goal.against == FASTEST else goal.against
    name = f"{rival} (fastest)" if goal.against == FASTEST and rival else goal.against
    if own not in times or rival not in times:
        why = record["refused"].get(own) or record["refused"].get(rival, "not timed")
        cells = ["not timed", name, "", cell(why), f"{goal.times:g}x", "unknown"]
    else:
        value = record["ratios"][rival]
        cells = [
            latency(times[own]),
            name,
            latency(times[rival]),
            ratio(value),
            f"{goal.times:g}x",
            verdict(value, goal),
        ]
    return f"| {work.name} | {record['threads']} | " + " | ".join(cells) + " |"


def verdict(value: Mapping[str, float], goal: Goal) -> str:
    """``yes`` and ``no`` only where the whole interval says so."""
    if value["low"] >= goal.times:
        return "yes"
    return "no" if value["high"] < goal.times else "unsure"


def _fastest(work: Work, record: Record) -> str:
    """The quickest of the peers that were timed, or nothing."""
    timed = [name for name in work.peers if name in record["latency_s"]]
    return min(timed, key=lambda name: float(record["latency_s"][name]["median"]), default="")
