"""The matrix as a table: per exporter and form of attention, of how many attentions what is known, and by whom."""

from __future__ import annotations

import collections
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from models.cells import Cell
from models.families import Family
from models.rivals import RIVALS, Verdict

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
EXPORTERS = {"l": "TorchScript", "t": "TorchScript, fixed axes", "d": "dynamo", "s": "dynamo, fixed axes"}
FORMATS = {"h": ", float16", "b": ", bfloat16", "c": ", converted to float16", "k": ", converted, float32 interface"}


@dataclass(frozen=True)
class Row:
    """One cell: our states and the others' verdicts, or why there are none."""

    cell: Cell
    family: Family
    states: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"{self.cell.name} | not exported: {self.failure[:150]}"
        values = [self.cell.name, self.family.attentions, *self.states.values(), *self.verdicts.values()]
        return " | ".join(map(str, values))


def text(rows: Sequence[Row]) -> str:
    """The summary, what could not be exported, and the machine, as Markdown."""
    return "\n".join([*_table(rows), "", *_notes(rows), "", machine(), ""])


def machine() -> str:
    """Versions and processor, in one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, {', '.join(versions)}, {platform.system()} {platform.machine()}."


def exporter(variant: str) -> str:
    """A variant in words."""
    number_format = FORMATS.get(variant[-1], "")
    return f"{EXPORTERS[variant[0]]} {variant[1:].rstrip('hbck')}{number_format}"


def _table(rows: Sequence[Row]) -> list[str]:
    compared = any(row.verdicts for row in rows)
    names = ["exporter", "attention", "graphs", "true", "found", "mapped", "lowerable", "false"]
    names += ["optimizer", "onnxscript"] if compared else []
    groups: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        if not row.failure and not row.family.negative:
            groups[row.cell.variant, row.cell.form].append(row)
    negatives = [row for row in rows if not row.failure and row.family.negative]
    lines = [names, ["---"] * 2 + ["---:"] * (len(names) - 2)]
    lines += [[exporter(variant), form, *_sums(group, compared)] for (variant, form), group in groups.items()]
    if negatives:
        lines.append(["all", "not to be taken for attention", *_sums(negatives, compared)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _sums(rows: Sequence[Row], compared: bool) -> list[str]:
    true = sum(row.family.attentions for row in rows)
    states = [
        sum(min(row.states[key], row.family.attentions) for row in rows) for key in ("found", "mapped", "lowerable")
    ]
    false = sum(max(0, row.states["found"] - row.family.attentions) for row in rows)
    cells = [str(number) for number in (len(rows), true, *states, false)]
    if not compared:
        return cells
    return cells + [_rival(row.verdicts[name] for row in rows if name in row.verdicts) for name in RIVALS]


def _rival(verdicts: Iterable[Verdict]) -> str:
    """Attentions fused rightly, and in brackets those in graphs that are wrong, do not run or cannot be compared."""
    counts: collections.Counter[str] = collections.Counter()
    for verdict in verdicts:
        counts[verdict.kind] += verdict.fused
    others = [f"{counts[kind]} {kind}" for kind in ("wrong", "does not run", "not compared") if counts[kind]]
    return f"{counts['right']} ({', '.join(others)})" if others else str(counts["right"])


def _notes(rows: Sequence[Row]) -> list[str]:
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        if row.failure:
            kinds[row.failure].append(row.cell.name)
    return [f"- {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in kinds.items()]
