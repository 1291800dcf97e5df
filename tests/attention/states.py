"""The state table: what must be known of every attention of every family, whoever exported it.

Graphs come from packs that ``python -m models.matrix --pack tests/fixtures`` writes. Every attention of every graph is
lowerable, but for the exceptions listed here with their reasons, and nothing else is taken for one.
"""

from __future__ import annotations

import collections
from functools import cache
from pathlib import Path

import onnx

from models.fixtures import Pack, read_pack
from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite, Recognition
from rewriter.graph.onnx import load

FIXTURES = Path(__file__).parent.parent / "fixtures"

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
PROBLEMS = {
    **BIAS_DEPENDS,
    **{family: {"exposed-probabilities"} for family in EXPOSED},
    **{family: {"head-mixing"} for family in MIXED},
}
HEADS = {"swin": {2, 4}, "segformer": {2, 4}}
KV_HEADS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"), 2) | {"falcon": 1}
POSITION = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "falcon", "gpt_neox", "modernbert"), "rotary"
)


@cache
def pack(name: str) -> Pack:
    """One of the packs of fixtures."""
    return read_pack(FIXTURES / f"{name}.tar.xz")


def family_of(cell: str) -> str:
    """The family of a cell, forms with a cache counted with those without."""
    return cell.split(".")[0].removesuffix("_past")


def found_in(model: onnx.ModelProto, folder: Path) -> Recognition:
    """What is found in a model."""
    onnx.save(model, folder / "model.onnx")
    return recognise(load(folder / "model.onnx"))


def check_state(cell: str, found: Recognition) -> None:
    """Assert that everything known of a cell is as the table says."""
    family = family_of(cell)
    attentions, feed_forwards = BLOCKS[family]
    expected = "mapped" if family in EXPOSED else "found" if family in MIXED else "lowerable"
    states = collections.Counter(site.state.value for site in found.attention)
    assert states == ({expected: attentions} if attentions else {}), [site.problems for site in found.attention]
    problems = [site.problems for site in found.feed_forward]
    assert [site.state.value for site in found.feed_forward] == ["lowerable"] * feed_forwards, problems
    assert not found.unrecognised
    for site in found.attention:
        _check_site(cell, family, site)


def _check_site(cell: str, family: str, site: AttentionSite) -> None:
    codes = {problem.code for problem in site.problems}
    # Whether a cache may get other sizes concerns one pass, not what may be rewritten at all.
    about_caches = {code for code in codes if code.startswith("cache-")}
    assert codes - about_caches == PROBLEMS.get(family, set())
    assert site.cached or not about_caches
    assert site.heads in HEADS.get(family, {4})
    assert site.kv_heads == KV_HEADS.get(family, site.heads)
    assert site.position == POSITION.get(family, site.position)
    past = cell.split(".")[0].endswith("_past")
    assert site.cached == (past and not site.cross)
