"""The packs hold every cell of the matrix: a graph, a graph that says the same, or what the exporter said."""

from __future__ import annotations

import pytest

from models.cells import HALF, OLD, PLAIN, cells
from tests.attention.states import BLOCKS, FIXTURES, family_of, pack

PACKS = (*PLAIN, "half", "old")


def test_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()}
    assert set(sizes) >= {f"{name}.tar.xz" for name in PACKS}
    assert all(size < 2 * 2**20 for size in sizes.values()), sizes


@pytest.mark.parametrize("name", PACKS)
def test_no_cell_is_left_out(name: str) -> None:
    packed = pack(name)
    wanted = [cell.name for cell in cells((*PLAIN, *HALF, *OLD)) if cell.pack == name]
    assert sorted([*packed.models, *packed.same, *packed.failed]) == sorted(wanted)
    assert all(packed.failed.values()), "the exporter's words are kept"
    for cell, like in packed.same.items():
        assert like in pack(like_pack(like)).models
        assert BLOCKS[family_of(cell)] == BLOCKS[family_of(like)]


def like_pack(cell: str) -> str:
    """The pack of a cell given by name."""
    return next(found.pack for found in cells((*PLAIN, *HALF, *OLD)) if found.name == cell)


def test_the_exporters_fail_where_they_did() -> None:
    """A list that only gets shorter: cells of the plain matrix without a graph."""
    failed = {cell for name in PLAIN for cell in pack(name).failed}
    falcon = {f"{form}.sdpa.{variant}" for form in ("falcon", "falcon_past") for variant in ("d23", "d24")}
    assert failed == falcon | {"torch_encoder.eager.l17", "whisper.eager.l17", "whisper.sdpa.l17"}
