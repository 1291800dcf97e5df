"""Tables for the terminal: scan, profile, verify and doctor."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as text; cells are never read as markup."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(entry)) for entry in row))
    stream = io.StringIO()
    Console(file=stream, width=150, no_color=True, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def scan_table(found: Mapping[str, Any]) -> str:
    """What `optimize scan` prints."""
    rows = [[row["part"], f"{1e3 * row['latency_s']:.2f} ms", f"{100 * row['share']:.0f} %"] for row in found["parts"]]
    text = render("Where the time goes", ["part", "latency", "share"], rows)
    gains = [[row["rewrite"], f"{row['at_most']:.2f}x", row["why"]] for row in found["gains"]]
    text += "\n" + render("What each class of rewrite could gain at most here", ["rewrite", "at most", "how"], gains)
    return text + "\n" + found["advice"]


def profile_table(found: Mapping[str, Any]) -> str:
    """What `optimize profile` prints."""
    rows = [
        [
            row["kernel"], row["calls"], f"{1e6 * row['seconds']:.1f} us", f"{100 * row['share']:.1f} %",
            f"{row['gflops_per_s']:.1f}", f"{row['gbytes_per_s']:.1f}", row["bound"],
            f"{100 * row['of_roofline']:.0f} %",
        ]
        for row in found["kernels"]
    ]  # fmt: skip
    columns = ["kernel", "calls", "per run", "share", "GF/s", "GB/s", "bound by", "of the roofline"]
    sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found["shapes"].items())
    peaks = ", ".join(f"{form} {1e-9 * rate:.0f} GF/s" for form, rate in found["peaks"].items() if form != "bytes")
    title = f"{1e3 * found['seconds']:.3f} ms per run at {sizes}, {found['threads']} threads"
    machine = f"virtual machine: {1e6 * found['virtual_machine_seconds']:.1f} us per run, callbacks included"
    memory = f"measured here: {peaks}, memory {1e-9 * found['peaks']['bytes']:.0f} GB/s"
    return f"{render(title, columns, rows)}\n{machine}\n{memory}"


def verification_table(found: Mapping[str, Any]) -> str:
    """What `optimize verify` prints."""
    rows = [[row["check"], "ok" if row["ok"] else "FAILED", row["detail"]] for row in found["checks"]]
    return render("Verification", ["check", "result", "detail"], rows)


def doctor_table(found: Mapping[str, Any]) -> str:
    """What `optimize doctor` prints."""
    rows = [[row["check"], "ok" if row["ok"] else "PROBLEM", row["detail"]] for row in found["checks"]]
    return render("Doctor", ["check", "result", "detail"], rows)
