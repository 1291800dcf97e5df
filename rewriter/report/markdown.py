"""report.md and the closing summary, drawn from report.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewriter.report.lengths import lengths_lines, lengths_section
from rewriter.report.runtimes import kept_row, runtimes_lines, runtimes_section
from rewriter.report.words import cell, latency, ratio

__all__ = ["cell", "latency", "markdown", "ratio", "summary"]

Report = Mapping[str, Any]

_RIVALS = {
    "original": "the original in the same runtime",
    "onnxruntime": "ONNX Runtime fp32 on the original",
    "onnxruntime_int8": "ONNX Runtime dynamic int8 on the original",
}


def summary(report: Report) -> str:
    """A few lines for the terminal: what was kept, how much faster it is, what is certain about its quality."""
    lines = ["", _headline(report)]
    for artifact, rivals in report["speedup"].items():
        facts = [f"{ratio(value)} against {_RIVALS[name]}" for name, value in rivals.items() if value]
        lines += [f"  {artifact}: " + "; ".join(facts)] if facts else []
    lines += ["  " + line for line in lengths_lines(report.get("lengths"), _RIVALS)]
    lines += ["  " + line for line in runtimes_lines(report.get("runtimes", ()), report["best"].get("load", ""))]
    lines += ["  " + line for line in _quality(report)]
    lines += [f"  note: {note}" for note in report["notes"]]
    if report.get("output"):
        lines.append(f"  written to {report['output']}")
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The whole report for people."""
    parts = [f"# {_headline(report)}", ""]
    parts += _speed_section(report)
    parts += runtimes_section(report.get("runtimes", ()), report["best"].get("load", ""))
    parts += lengths_section(report.get("lengths"), _RIVALS)
    parts += ["## Does it still do its job?", "", *[f"- {line}" for line in _quality(report)], ""]
    parts += _sites_section(report)
    parts += _forms_section(report)
    parts += _search_section(report)
    if report["notes"]:
        parts += ["## Notes", "", *[f"- {cell(note)}" for note in report["notes"]], ""]
    parts += ["## Where this was measured", ""]
    parts += [f"- {name}: {cell(value)}" for name, value in report["environment"].items()]
    return "\n".join(parts) + "\n"


def _headline(report: Report) -> str:
    if report["best"]["kept_original"]:
        return "The original is kept: nothing was both faster and good enough"
    kept = kept_row(report.get("runtimes", ()))
    if kept is not None and kept["against_original"]:
        return f"A variant is kept: {ratio(kept['against_original'])} faster than the original in its fastest runtime"
    # The artifact of the runtime that decided; the other one may not have been timed.
    artifact = report["best"].get("artifact") or ("model.so" if report["best"]["runtime"] == "tvm" else "model.onnx")
    best = report["speedup"][artifact]["original"]
    how = f"{ratio(best)} faster than" if best else "not timed beside"
    return f"A variant is kept: {how} the original in the same runtime"


def _quality(report: Report) -> list[str]:
    metric = report["metric"]
    if metric is None:
        return ["only exact rewrites were considered, because no data was given; they agree with the original"]
    drop = metric["drop"]
    words = (
        f"{metric['name']}: {metric['baseline']:.4f} before, {metric['best']:.4f} after, "
        f"drop {100 * drop['median']:.2f} points [{100 * drop['low']:.2f}, {100 * drop['high']:.2f}]"
    )
    level = f"{100 * metric['confidence']:.0f} %"
    verdict = (
        f"certified: drop at most {metric['max_drop']} with {level} confidence, n = {metric['n']:,}"
        if metric["certified"]
        else f"not certified (n = {metric['n']:,}): {metric.get('reason', '')}"
    )
    lines = [words, verdict]
    task = report.get("task")
    if task:
        lines.append(
            f"labelled task, {task['name']}: {100 * task['baseline']:.2f} % before, {100 * task['best']:.2f} % after, "
            f"drop {100 * task['drop']['median']:.2f} points [{100 * task['drop']['low']:.2f}, "
            f"{100 * task['drop']['high']:.2f}], n = {task['n']:,}"
        )
    return lines


def _speed_section(report: Report) -> list[str]:
    lines = [
        "## How much faster",
        "",
        "| artifact | " + " | ".join(_RIVALS.values()) + " |",
        "| --- | --- | --- | --- |",
    ]
    for artifact, rivals in report["speedup"].items():
        cells = [ratio(rivals[name]) if rivals.get(name) else "not measured" for name in _RIVALS]
        lines.append(f"| {artifact} | " + " | ".join(cells) + " |")
    lines += ["", "| | runtime | latency | parameters | FLOPs |", "| --- | --- | --- | --- | --- |"]
    for name in ("baseline", "best"):
        subject = report[name]
        lines.append(
            f"| {name} | {subject['runtime']} | {latency(subject['latency_s'])} | {subject['parameters']:,} "
            f"| {subject['flops']:,} |"
        )
    lines += ["", "Ratios are medians over blocks taken in turn, with 95 % bootstrap intervals; 1.00x means equal.", ""]
    if report["contributions"]:
        lines += ["| rewrite | predicted gain | share |", "| --- | --- | --- |"]
        lines += [
            f"| {item['rewrite']} | {1e3 * item['gain_s']:.2f} ms | {100 * item['share']:.0f} % |"
            for item in report["contributions"]
        ]
        lines.append("")
    return lines


def _sites_section(report: Report) -> list[str]:
    lines = ["## What was done where", "", "| site | size | chosen | left alone because |", "| --- | --- | --- | --- |"]
    for site in report["sites"]:
        size = (
            f"{site['heads']} heads ({site['kv_heads']} KV) of {site['head_dim']}"
            if site["kind"] == "attention"
            else f"width {site['width']}"
        )
        chosen = ", ".join(cell(option.partition("@")[0]) for option in site["chosen"]) or "unchanged"
        refused = "; ".join(f"{name}: {cell(why)}" for name, why in site["refusals"].items())
        lines.append(f"| {cell(site['id'])} | {size} | {chosen} | {refused} |")
    return [*lines, ""]


def _forms_section(report: Report) -> list[str]:
    """The forms of attention that were compared in ONNX Runtime."""
    found = report.get("forms")
    if not found or not found["tried"]:
        return []
    lines = ["## Forms of attention in ONNX Runtime", "", "| form | sites | one sub-block | | outcome |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in found["tried"]:
        times = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        lines.append(
            f"| {cell(row['option'])} | {cell(', '.join(row['sites']))} "
            f"| {'' if row['latency_s'] is None else latency(row['latency_s'])} | {times} | {cell(row['outcome'])} |"
        )
    whole = found["ratio"]
    if whole is not None:
        kept = "kept" if found["kept"] else "not certainly faster, so attentions are written out"
        lines += ["", f"The whole graph in the chosen forms against itself written out: {ratio(whole)}, {kept}."]
    return [*lines, ""]


def _search_section(report: Report) -> list[str]:
    lines = ["## What was tried", "", "| variant | predicted | damage on the selection split | outcome |"]
    lines.append("| --- | --- | --- | --- |")
    for variant in report["variants"]:
        predicted, damage = variant.get("predicted_saving_s"), variant.get("damage")
        lines.append(
            f"| {cell(variant['name'])} | {'' if predicted is None else f'{1e3 * predicted:.2f} ms saved'} "
            f"| {'' if damage is None else f'{100 * damage:.3f} points'} | {cell(variant.get('outcome', ''))} |"
        )
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    return [*lines, "", f"{report['variants_timed']} variants were compiled and timed. Time spent: {stages}.", ""]
