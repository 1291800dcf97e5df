"""The cells of the matrix: a family, the form of its attention, an exporter with its opset; and their files.

A cell's file is made once. What an exporter cannot write is tried once, and its words are kept beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.families import FAMILIES, Family, Form

# Fixed axes of the TorchScript exporter are shown on every position, mask, projection and cache form.
SPREAD = (
    "albert",
    "bart",
    "bert",
    "bloom",
    "conv1x1",
    "deberta_v2",
    "gemma2",
    "gpt2",
    "gpt2_past",
    "gpt_neox",
    "llama",
    "llama_past",
    "packed_qk_norm",
    "swin",
    "t5",
    "torch_mha",
    "vit",
    "wav2vec2",
)
# Number formats and old opsets are shown on these.
FEW = ("bert", "conv1x1", "gpt2_past", "llama", "packed_qk_norm", "t5", "vit")
PLAIN = ("l17", "t17", "d18", "d20", "d23", "d24", "s18")
HALF = ("l17h", "l17b", "l17c", "l17k", "d18h", "d18b", "d18k", "d23h")
OLD = ("l10", "l11", "l12", "l13", "l14", "l15", "l16")
_COLOURS = re.compile(r"\x1b\[\d*m")


@dataclass(frozen=True)
class Cell:
    """One export. Its name is ``family.form.variant``.

    Variants are those of `models.export`, and ``c`` or ``k`` after one without number format: a converter turned the
    float32 export to float16, inputs and outputs too, or kept those in float32.
    """

    family: str
    form: Form
    variant: str

    @property
    def name(self) -> str:
        """What its files and rows are called."""
        return f"{self.family}.{self.form}.{self.variant}"

    def path(self, folder: Path) -> Path:
        """Where its graph is kept."""
        return folder / f"{self.name}.onnx"

    def failure(self, folder: Path) -> str:
        """What the exporter said if it could not write the cell, in one line; empty if it was not tried or could."""
        kept = self.path(folder).with_suffix(".failed")
        return kept.read_text().splitlines()[0] if kept.exists() else ""

    @property
    def pack(self) -> str:
        """The pack of the tests it belongs to."""
        if self.variant in PLAIN:
            return self.variant
        return "half" if self.variant[-1].isalpha() else "old"


def cells(variants: Sequence[str], families: Sequence[str] = ()) -> Iterator[Cell]:
    """All cells of these variants: of all families, or of the spread where a variant is shown on one."""
    for variant in variants:
        for name in families or shown_on(variant):
            for form in FAMILIES[name].forms:
                yield Cell(name, form, variant)


def shown_on(variant: str) -> Sequence[str]:
    """The families a variant is exported of by default."""
    if variant == "t17":
        return SPREAD
    return tuple(FAMILIES) if variant in PLAIN else FEW


def family_of(cell: Cell) -> Family:
    """The family of a cell."""
    return FAMILIES[cell.family]


def make(cell: Cell, folder: Path) -> None:
    """Write the cell's graph if that was not tried before."""
    from models.export import convert_to_half, export

    path = cell.path(folder)
    failed, partial = path.with_suffix(".failed"), path.with_suffix(".partial")
    if path.exists() or failed.exists():
        return
    try:
        if cell.variant.endswith(("c", "k")):
            base = replace(cell, variant=cell.variant[:-1])
            make(base, folder)
            convert_to_half(base.path(folder), partial, keep_interface=cell.variant.endswith("k"))
        else:
            export(lambda: family_of(cell).build(cell.form), cell.variant, partial)
    except Exception as problem:  # noqa: BLE001 - exporters raise anything; it is recorded and shown
        partial.unlink(missing_ok=True)
        record_failure(cell, folder, f"{type(problem).__name__}: {problem}")
    else:
        partial.replace(path)


def record_failure(cell: Cell, folder: Path, words: str) -> None:
    """Keep what went wrong, as one line without colours."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    # The dynamo exporter puts the cause after advice.
    cause = [line for line in lines[1:] if "Error" in line or "<class" in line][:1]
    plain = _COLOURS.sub("", " ".join([*lines[:1], *cause]))
    cell.path(folder).with_suffix(".failed").write_text(plain[:300] + "\n")
