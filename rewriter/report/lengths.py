"""Requests of all lengths, for the terminal and for report.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewriter.report.words import cell, latency, ratio

Entry = Mapping[str, Any]


def lengths_lines(entry: Entry | None, names: Mapping[str, str]) -> list[str]:
    """For the summary: which sizes, and how fast over all lengths. `names` says how rivals are called."""
    if entry is None:
        return []
    lines = []
    if entry["sizes"]:
        parts = ", ".join(f"{_size(one)} ({100 * one['share']:.0f} %)" for one in entry["sizes"])
        lines.append(f"sizes built for {entry['source']}: {parts}{_waste(entry)}")
    if entry["race"] is not None and entry["race"]["speedup"]:
        found = entry["race"]["speedup"].items()
        facts = [f"{ratio(value)} against {_named(name, names)}" for name, value in found]
        lines.append("over your lengths, model.so: " + "; ".join(facts))
    return lines


def lengths_section(entry: Entry | None, names: Mapping[str, str]) -> list[str]:
    """For report.md."""
    if entry is None:
        return []
    tokens = entry["tokens"]
    shown = ", ".join(f"{100 * float(share):.0f} % up to {count}" for share, count in tokens["quantiles"].items())
    lines = [
        "## Over the lengths of requests",
        "",
        f"{entry['requests']:,} requests of {cell(entry['source'])}: {tokens['mean']:.1f} tokens on average, {shown}, "
        f"the longest {tokens['longest']}. Sizes are {cell(entry['why'])}. "
        f"Beyond the largest: {entry['beyond']['what']}.",
        "",
    ]
    if entry["sizes"]:
        lines += ["| size | requests it serves | one run |", "| --- | --- | --- |"]
        lines += [f"| {_size(one)} | {100 * one['share']:.1f} % | {_ms(one['latency_s'])} |" for one in entry["sizes"]]
        lines.append("")
    expected = entry["expected_s"]
    if expected is not None:
        lines += [
            f"A request takes {_ms(expected['sizes'])} on average by these measurements; "
            f"{_ms(expected['largest_alone'])} if all were padded to the largest size, "
            f"{_ms(expected['every_length'])} if every length had a size.",
            "",
        ]
    return lines + _race(entry["race"], names)


def _race(race: Entry | None, names: Mapping[str, str]) -> list[str]:
    if race is None:
        return []
    lines = [
        f"Passes over {race['requests']} requests, from arrays to arrays, padding included; engines with dynamic "
        "shapes got the true lengths:",
        "",
        "| | mean per request | model.so is faster by |",
        "| --- | --- | --- |",
    ]
    for name, value in race["latency_s"].items():
        beaten = ratio(race["speedup"][name]) if name in race["speedup"] else ""
        lines.append(f"| {cell(_named(name, names))} | {latency(value)} | {beaten} |")
    lines += [f"| {cell(_named(name, names))} | {cell(why)} | |" for name, why in race["failures"].items()]
    return [*lines, ""]


def _waste(entry: Entry) -> str:
    expected = entry["expected_s"]
    if expected is None:
        return ""
    gain = expected["largest_alone"] / expected["sizes"]
    return f"; {_ms(expected['sizes'])} per request, {gain:.2f}x faster than padded to the largest"


def _size(one: Entry) -> str:
    return str(one["tokens"]) if one["batch"] == 1 else f"{one['batch']}x{one['tokens']}"


def _ms(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{1e3 * seconds:.2f} ms"


def _named(name: str, names: Mapping[str, str]) -> str:
    if name.endswith("@onnxruntime"):
        return "model.onnx in ONNX Runtime"
    return names.get(name, name)
