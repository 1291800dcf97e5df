"""Families of the matrix through TVM, as ``python -m models.matrix --tvm`` runs all of them: one of every kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest

from models.fixtures import Pack, read_pack
from models.tvm_coverage import check

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
# pack, cell and the number of sites that are rewritten
CELLS = [
    ("l17", "bert.eager.l17", 4),
    ("d18", "bloom_past.eager.d18", 4),  # positions by distance, and a cache
    ("l17", "conv1x1.eager.l17", 1),
    ("d18", "gpt2_past.sdpa.d18", 4),
    ("d23", "llama.sdpa.d23", 4),  # rotation, groups, and attention as one operator
    ("d18", "packed_qk_norm.eager.d18", 1),
    ("d23", "soft_router.sdpa.d23", 1),
    ("l17", "talking_heads.eager.l17", 0),  # nothing is rewritten: operator by operator
    ("d18", "whisper_dec_past.sdpa.d18", 6),  # across two sequences
    ("d18", "vit.sdpa.d18", 4),
    ("half", "bert.sdpa.l17c", 4),
    ("t17", "t5.eager.t17", 10),
]


@cache
def pack(name: str) -> Pack:
    return read_pack(FIXTURES / f"{name}.tar.xz")


@pytest.mark.parametrize(("packed", "cell", "sites"), CELLS, ids=[cell for _, cell, _ in CELLS])
def test_family_agrees_with_onnxruntime(packed: str, cell: str, sites: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(pack(packed).models[cell], path)
    found = check(path, rounds=(1,))
    assert found.verdict == "ok", found
    assert found.sites == sites


def test_what_cannot_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(read_pack(FIXTURES / "heldout" / "heldout.tar.xz").models["luong.eager.l17"], path)
    found = check(path, rounds=(0,))
    assert found.verdict == "unsupported" and "operator GRU (node '/rnn/GRU')" in found.detail
