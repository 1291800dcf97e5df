"""The state table: every family, exporter and form of attention, and what must be known of each.

Graphs come from packs that ``python -m models.matrix --pack tests/fixtures`` writes. Every attention of every graph is
lowerable, but for the exceptions listed here with their reasons, and nothing else is taken for one.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnx
import pytest

from models.fixtures import read_pack
from rewriter.attention.recognise import recognise
from rewriter.core.site import Recognition
from rewriter.graph.onnx import load

PACKS = sorted((Path(__file__).parent.parent / "fixtures").glob("*.zip"))

# family: (attentions, feed-forwards)
BLOCKS = {
    "albert": (2, 2),
    "bart": (6, 4),
    "bert": (2, 2),
    "bert_outputs_attentions": (2, 2),
    "bloom": (2, 2),
    "clip_text": (2, 2),
    "clip_vision": (2, 2),
    "conformer_rel": (2, 4),
    "conv1x1": (1, 0),
    "deberta_v2": (2, 2),
    "deit": (2, 2),
    "dinov2": (2, 2),
    "distilbert": (2, 2),
    "falcon": (2, 2),
    "gemma2": (2, 2),
    "gpt2": (2, 2),
    "gpt_neox": (2, 2),
    "linear_attention": (0, 0),
    "llama": (2, 2),
    "mamba": (0, 0),
    "mistral": (2, 2),
    "mobilevit": (9, 9),
    "modernbert": (3, 3),
    "mpnet": (2, 2),
    "opt": (2, 2),
    "packed_chunk": (1, 0),
    "packed_qk_norm": (1, 0),
    "packed_unbind": (1, 0),
    "phi3": (2, 2),
    "qwen2": (2, 2),
    "qwen3": (2, 2),
    "roberta": (2, 2),
    "sam_vision": (2, 2),
    "segformer": (4, 0),
    "soft_router": (1, 0),
    "swin": (4, 4),
    "t5": (6, 4),
    "talking_heads": (1, 0),
    "torch_encoder": (2, 2),
    "torch_mha": (1, 0),
    "torch_mha_weights": (1, 0),
    "vit": (2, 2),
    "wav2vec2": (2, 2),
    "whisper": (6, 4),
    "whisper_dec": (4, 2),
}
# the probabilities leave the model: mapped, never rewritten
EXPOSED = ("bert_outputs_attentions", "torch_mha_weights")
# a linear map between scores and values mixes heads: found, and weights are no one head's
MIXED = ("talking_heads",)
# an additive term of the scores is made from queries or keys; it is kept as the graph computes it
BIAS_DEPENDS = {
    "conformer_rel": {"bias-depends-on-query"},
    "deberta_v2": {"bias-depends-on-query", "bias-depends-on-key"},
    "sam_vision": {"bias-depends-on-query", "bias-depends-on-key"},
}
PROBLEMS = BIAS_DEPENDS | dict.fromkeys(EXPOSED, {"exposed-probabilities"}) | dict.fromkeys(MIXED, {"head-mixing"})
HEADS = {"swin": {2, 4}, "segformer": {2, 4}}
KV_HEADS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"), 2) | {"falcon": 1}
POSITION = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "falcon", "gpt_neox", "modernbert"), "rotary"
)


def _graphs() -> Iterator[tuple[str, onnx.ModelProto]]:
    for pack in PACKS:
        yield from read_pack(pack)


MODELS = dict(_graphs())


@cache
def _found(name: str, folder: Path) -> Recognition:
    path = folder / "model.onnx"
    onnx.save(MODELS[name], path)
    return recognise(load(path))


def _family(name: str) -> str:
    return name.split(".")[0].removesuffix("_past")


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_has_its_state(name: str, tmp_path: Path) -> None:
    family = _family(name)
    found = _found(name, tmp_path)
    attentions, feed_forwards = BLOCKS[family]
    expected = "mapped" if family in EXPOSED else "found" if family in MIXED else "lowerable"
    states = collections.Counter(site.state.value for site in found.attention)
    assert states == ({expected: attentions} if attentions else {}), [site.problems for site in found.attention]
    assert [site.state.value for site in found.feed_forward] == ["lowerable"] * feed_forwards
    assert not found.unrecognised
    for site in found.attention:
        codes = {problem.code for problem in site.problems}
        assert codes == PROBLEMS.get(family, set())
        assert site.heads in HEADS.get(family, {4})
        assert site.kv_heads == KV_HEADS.get(family, site.heads)
        assert site.position == POSITION.get(family, site.position)
        past = name.split(".")[0].endswith("_past")
        assert site.cached == (past and not site.cross)


def test_the_packs_are_small_and_cover_the_matrix() -> None:
    assert all(pack.stat().st_size < 2 * 2**20 for pack in PACKS)
    variants = collections.Counter(name.rsplit(".", 1)[1] for name in MODELS)
    assert set(variants) >= {"l17", "d18", "d20", "d23", "d24", "s18"}
    assert {_family(name) for name in MODELS} == set(BLOCKS)
