"""Graphs as ONNX Runtime's optimizers and onnxscript emit them: every block is lowerable.

The pack is written by ``python -m models.fused --pack tests/fixtures/fused/fused.tar.xz``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest

from models.fixtures import read_pack
from models.fused import PACKED
from rewriter.attention.recognise import recognise
from rewriter.graph.onnx import load

PACK = Path(__file__).parent.parent / "fixtures" / "fused" / "fused.tar.xz"
# family: (attentions, feed-forwards)
BLOCKS = {"bart": (6, 4), "t5": (6, 4), "whisper": (6, 4)}
EMITTED = {
    "Attention",
    "BiasGelu",
    "EmbedLayerNormalization",
    "FusedMatMul",
    "Gelu",
    "MultiHeadAttention",
    "QuickGelu",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}


@cache
def models() -> dict[str, onnx.ModelProto]:
    return dict(read_pack(PACK).models)


@pytest.mark.parametrize("name", [".".join(parts) for parts in PACKED])
def test_every_block_of_a_fused_graph_is_lowerable(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(models()[name], path)
    family = name.split(".")[0]
    found = recognise(load(path))
    attentions, feed_forwards = BLOCKS.get(family, (2, 2))
    assert [site.state.value for site in found.attention] == ["lowerable"] * attentions, [
        site.problems for site in found.attention
    ]
    assert [site.state.value for site in found.feed_forward] == ["lowerable"] * feed_forwards
    assert not found.unrecognised
    for site in found.attention:
        assert site.heads == 4
        assert site.kv_heads in (2, 4)
        assert site.cached == (family.endswith("_past"))


def test_the_pack_is_small_and_holds_every_fusion() -> None:
    assert PACK.stat().st_size < 400_000
    assert {node.op_type for model in models().values() for node in model.graph.node} >= EMITTED
