"""The state table over the dynamo exporter before opset 23."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attention.states import check_state, found_in, pack

CELLS = {name: model for packed in ("d18", "d20") for name, model in pack(packed).models.items()}


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_has_its_state(cell: str, tmp_path: Path) -> None:
    check_state(cell, found_in(CELLS[cell], tmp_path))
