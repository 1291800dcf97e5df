"""The runtimes of a report: which one is fastest with which graph, and the line that loads what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.report.words import cell, latency, ratio

Row = Mapping[str, Any]


def kept_row(rows: Sequence[Row]) -> Row | None:
    """The row of what was kept."""
    return next((row for row in rows if row["outcome"] == "kept"), None)


def runtimes_lines(rows: Sequence[Row], load: str) -> list[str]:
    """For the terminal: the kept pair of runtime and graph, those that were faster and why they were not kept."""
    kept = kept_row(rows)
    if kept is None:
        return []
    names = {row["runtime"] for row in rows}
    lines = [f"runtime: {_words(kept)}, {latency(kept['latency_s'])}, of {len(names)} runtimes that were timed"]
    lines += [
        f"faster but not kept: {_words(row)}, {latency(row['latency_s'])}: {row['outcome']}"
        for row in rows
        if row["latency_s"]["median"] < kept["latency_s"]["median"]
    ]
    return [*lines, f"to load it: {load}"]


def runtimes_section(rows: Sequence[Row], load: str) -> list[str]:
    """The table for report.md; nothing where one runtime was timed alone."""
    if not rows:
        return []
    lines = ["## Runtimes", "", "| runtime | precision | graph | latency | against the original | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        gain = "not measured" if row["against_original"] is None else ratio(row["against_original"])
        cells = [row["runtime"], row["precision"], row["graph"], latency(row["latency_s"]), gain, row["outcome"]]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    lines += [
        "",
        "The original is taken in the fastest runtime that computes in its own numbers. What rounds is scored and",
    ]
    lines += ["certified as it runs, like any rewrite. What was kept is loaded by", "", "```python", load, "```", ""]
    return lines


def _words(row: Row) -> str:
    precision = "" if row["precision"] == "as the graph" else f" ({row['precision']})"
    graph = "the original" if row["graph"] == "original" else row["graph"]
    return f"{row['runtime']}{precision} with {graph}"
