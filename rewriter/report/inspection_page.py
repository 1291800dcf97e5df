"""What `optimize inspect` prints: layers that are alike in one line, what may be done to them and what may not."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewriter.report.tables import render

Entry = Mapping[str, Any]
SHARES = ("flops_share", "parameters_share")
WIDTH = 120


def inspection_page(found: Mapping[str, Any]) -> str:
    """The page for the data of `rewriter.inspection.inspect`."""
    groups = [*_groups(found["attention"]), *_groups(found["feed_forward"])]
    parts = [_headline(found)]
    if groups:
        columns = ["site", "kind", "state", "heads", "dims", "position", "mask", "FLOPs", "params"]
        parts.append(render("", columns, [_row(group) for group in groups]))
        parts.append(
            "FLOPs: share among these sites, for one sequence of 128 tokens. params: share of all stored numbers."
        )
    parts += _section("What can be rewritten", _possible(groups))
    parts += _section("What cannot, and why", _refused(groups))
    parts += _section("What else was noticed", _problems(groups))
    parts += _section("Looks like attention and was not understood", _unrecognised(found["unrecognised"]))
    return "\n".join(parts)


def _headline(found: Mapping[str, Any]) -> str:
    sites = [*found["attention"], *found["feed_forward"]]
    ready = sum(site["state"] == "lowerable" for site in sites)
    counts = [(len(found["attention"]), "attention"), (len(found["feed_forward"]), "feed-forward")]
    text = ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    if not sites:
        return f"{text}."
    return f"{text}. Lowerable, that is shown to compute the same when written anew: {ready} of {len(sites)}."


def _groups(sites: Sequence[Entry]) -> list[list[Entry]]:
    """Sites that differ in nothing but their place, in order of the first of them."""
    groups: dict[str, list[Entry]] = {}
    for site in sites:
        alike = {key: value for key, value in site.items() if key not in ("id", "nodes", *SHARES)}
        alike["problems"] = [problem["code"] for problem in site["problems"]]
        alike["rewrites"] = {name: v if v == "ok" else v["refused"] for name, v in site["rewrites"].items()}
        groups.setdefault(repr(alike), []).append(site)
    return list(groups.values())


def _name(group: Sequence[Entry]) -> str:
    """``layers.0-5.attention`` for six layers in a row, ``layers.0,2.attention`` for two apart."""
    numbers = [int(match[1]) for site in group if (match := re.fullmatch(r"layers\.(\d+)\.\w+", site["id"]))]
    if len(numbers) != len(group):
        return ", ".join(site["id"] for site in group)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layers.{text}.{group[0]['id'].rpartition('.')[2]}"


def _row(group: Sequence[Entry]) -> list[str]:
    site = group[0]
    shares = [f"{100 * sum(one[key] for one in group):.1f} %" for key in SHARES]
    if "heads" not in site:
        kind = (
            f"{'gated ' if site['gated'] else ''}{'' if site['activation'] == 'path' else site['activation']}".strip()
        )
        return [_name(group), kind or "own function", site["state"], "", str(site["width"]), "", "", *shares]
    kind = ("cross" if site["cross"] else "self") + (" cached" if site["cache"] else "")
    heads = f"{site['heads']}" if site["heads"] == site["kv_heads"] else f"{site['heads']} / {site['kv_heads']} KV"
    dims = f"{site['qk_dim']}" if site["qk_dim"] == site["v_dim"] else f"{site['qk_dim']} / {site['v_dim']} V"
    mask = site["mask"] + (" causal" if site["causal"] and site["mask"] != "causal" else "")
    mask += f", cap {site['softcap']:g}" if site["softcap"] else ""
    return [_name(group), kind, site["state"], heads, dims, site["position"], mask, *shares]


def _possible(groups: Iterable[Sequence[Entry]]) -> list[str]:
    lines = []
    for group in groups:
        names = [name for name, verdict in group[0]["rewrites"].items() if verdict == "ok"]
        if names:
            lines.append(f"{_name(group)}: {', '.join(names)}")
    return lines


def _refused(groups: Iterable[Sequence[Entry]]) -> list[str]:
    """One line per group and reason, with all the rewrites that it forbids."""
    lines = []
    for group in groups:
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, verdict in group[0]["rewrites"].items():
            if verdict != "ok":
                others = {site["rewrites"][name]["why"] for site in group}
                why = verdict["why"] + ("; in other layers alike" if len(others) > 1 else "")
                reasons.setdefault((verdict["refused"], why), []).append(name)
        name = _name(group)
        known = len(group[0]["rewrites"])
        for (code, why), names in reasons.items():
            what = "no rewrite at all" if len(names) == known > 1 else f"no {', '.join(names)}"
            lines.append(f"{name}: {what}: {why} ({code})")
    return lines


def _problems(groups: Iterable[Sequence[Entry]]) -> list[str]:
    lines = []
    for group in groups:
        for problem in group[0]["problems"]:
            at = f", at {_few(problem['nodes'])}" if problem["nodes"] else ""
            lines.append(f"{_name(group)}: {problem['why']} ({problem['code']}{at})")
    return lines


def _unrecognised(entries: Iterable[Entry]) -> list[str]:
    """Nodes by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        reasons.setdefault((entry["code"], entry["why"]), []).append(entry["node"])
    return [f"{_few(nodes)}: {why} ({code})" for (code, why), nodes in reasons.items()]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _section(title: str, lines: Iterable[str]) -> list[str]:
    wrapped = [
        part for line in lines for part in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]
    return ["", title, *wrapped] if wrapped else []
