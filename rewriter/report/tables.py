"""Tables for the terminal: inspect, scan, verify and doctor."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def _render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(entry)) for entry in row))
    stream = io.StringIO()
    Console(file=stream, width=150, no_color=True, highlight=False).print(table)
    return stream.getvalue().rstrip()


def inspection_table(found: Mapping[str, Any]) -> str:
    """What `optimize inspect` prints."""
    rows = []
    for site in found["attention"]:
        dims = f"{site['qk_dim']}" if site["qk_dim"] == site["v_dim"] else f"{site['qk_dim']}/{site['v_dim']}"
        kind = "cross" if site["cross"] else "self"
        heads = f"{site['heads']}" if site["heads"] == site["kv_heads"] else f"{site['heads']}/{site['kv_heads']} KV"
        mask = site["mask"] + (" causal" if site["causal"] and site["mask"] != "causal" else "")
        rows.append(
            [site["id"], kind, site["state"], heads, dims, site["position"], mask, *_rewrites(site), *_share(site)]
        )
    for site in found["feed_forward"]:
        rows.append(
            [site["id"], site.get("activation", ""), site["state"], "", site.get("width", ""), "", "", *_rewrites(site),
             *_share(site)]
        )  # fmt: skip
    columns = ["site", "kind", "state", "heads", "dims", "position", "mask", "can be", "refused", "FLOPs", "params"]
    text = _render(f"{len(found['attention'])} attentions, {len(found['feed_forward'])} feed-forwards", columns, rows)
    left = [f"  {entry['node']}: {entry['why']}" for entry in found["unrecognised"]]
    return text + ("\nnot understood:\n" + "\n".join(left) if left else "")


def _rewrites(site: Mapping[str, Any]) -> tuple[str, str]:
    possible = ", ".join(name for name, verdict in site["rewrites"].items() if verdict == "ok")
    refused = "; ".join(f"{name}: {verdict['why']}" for name, verdict in site["rewrites"].items() if verdict != "ok")
    return possible, refused


def _share(site: Mapping[str, Any]) -> tuple[str, str]:
    def percent(key: str) -> str:
        return f"{100 * site[key]:.1f} %" if key in site else ""

    return percent("flops_share"), percent("parameters_share")


def scan_table(found: Mapping[str, Any]) -> str:
    """What `optimize scan` prints."""
    rows = [[row["part"], f"{1e3 * row['latency_s']:.2f} ms", f"{100 * row['share']:.0f} %"] for row in found["parts"]]
    text = _render("Where the time goes", ["part", "latency", "share"], rows)
    gains = [[row["rewrite"], f"{row['at_most']:.2f}x", row["why"]] for row in found["gains"]]
    text += "\n" + _render("What each class of rewrite could gain at most here", ["rewrite", "at most", "how"], gains)
    return text + "\n" + found["advice"]


def verification_table(found: Mapping[str, Any]) -> str:
    """What `optimize verify` prints."""
    rows = [[row["check"], "ok" if row["ok"] else "FAILED", row["detail"]] for row in found["checks"]]
    return _render("Verification", ["check", "result", "detail"], rows)


def doctor_table(found: Mapping[str, Any]) -> str:
    """What `optimize doctor` prints."""
    rows = [[row["check"], "ok" if row["ok"] else "PROBLEM", row["detail"]] for row in found["checks"]]
    return _render("Doctor", ["check", "result", "detail"], rows)
