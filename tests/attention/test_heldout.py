"""Families that nobody tuned on: what is known of each, asserted, so that recall on the unseen does not sink.

Graphs come from a pack that ``python -m models.heldout --pack tests/fixtures/heldout/heldout.tar.xz`` writes; how many
of all held-out graphs were recognised at first contact and are now is in docs/recognition-heldout.md.
"""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest

from models.fixtures import read_pack
from models.heldout import PACKED
from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite
from rewriter.graph.onnx import load

PACK = Path(__file__).parent.parent / "fixtures" / "heldout" / "heldout.tar.xz"
MODELS = {name.split(".")[0]: model for name, model in read_pack(PACK).models.items()}

# family: how many attentions in which state, "unmapped" where weights are not known per head, heads and key heads
EXPECTED: dict[str, dict[str, int]] = {
    "bahdanau": {},
    "bare": {"lowerable unmapped 1/1": 1},
    "bitnet": {"lowerable 4/2": 2},
    "blip2_qformer": {"lowerable 4/4": 3},
    "capsules": {},
    "channel_attention": {"found unmapped 4/4": 1},
    "chunked": {"lowerable unmapped 4/4": 2},
    "convbert": {"lowerable 2/2": 2},
    "cosine_heads": {"lowerable 4/4": 1},
    "cvt": {"lowerable 2/2": 2, "lowerable 4/4": 2},
    "deepseek_v3": {"lowerable unmapped 4/4": 2},
    "diffusion_block": {"lowerable 4/4": 2},
    "einsum_heads": {"lowerable 4/4": 1},
    "einsum_weights": {"lowerable 4/4": 1},
    "fastspeech2_conformer": {"lowerable 4/4": 2},
    "folded_heads": {"lowerable 4/4": 1},
    "funnel": {"lowerable 4/4": 3},
    "gated_heads": {"lowerable 4/4": 1},
    "gemma3": {"lowerable 4/2": 2},
    "gpt_bigcode": {"lowerable 4/1": 2},
    "gpt_bigcode_past": {"lowerable 4/1": 2},
    "gpt_neo": {"lowerable 4/4": 2},
    "gptj": {"lowerable 4/4": 2},
    "graph_attention": {},
    "hiera": {"found unmapped 16/16": 1},
    "hunyuan": {"lowerable 4/2": 2},
    "idefics_perceiver": {"lowerable unmapped 4/4": 1, "lowerable 4/4": 1},
    "image_generator": {"lowerable 1/1": 1},
    "image_pixels": {"lowerable 4/4": 1},
    "kernel_attention": {},
    "keys_first": {"lowerable 4/4": 1},
    "layoutlmv3": {"lowerable 4/4": 2},
    "lilt": {"mapped 4/4": 2, "lowerable 4/4": 1},
    "longformer": {},
    "longt5_local": {"found unmapped 4/4": 2, "lowerable 4/4": 4},
    "luke": {},
    "luong": {"lowerable unmapped 1/1": 1},
    "memory_tokens": {"lowerable unmapped 4/4": 1},
    "mixtral": {"lowerable 4/2": 2},
    "mpt": {"lowerable 4/4": 2},
    "multi_query": {"lowerable 4/1": 1},
    "nanochat": {"lowerable 4/2": 2},
    "nanogpt": {"lowerable 4/4": 1},
    "non_local": {"lowerable 1/1": 1},
    "nystromformer": {"lowerable 4/4": 2},
    "olmo": {"lowerable unmapped 4/4": 2},
    "over_heads": {"mapped 4/4": 1},
    "perceiver": {"lowerable unmapped 4/4": 1, "lowerable 4/4": 2},
    "performer": {},
    "pooled_by_query": {"lowerable unmapped 4/4": 1},
    "pooled_tokens": {},
    "qwen2_vl_vision": {"lowerable unmapped 4/4": 2},
    "relative_shift": {"lowerable 4/4": 1},
    "retention": {},
    "roformer": {"lowerable 4/4": 2},
    "set_pooling": {"lowerable unmapped 4/4": 2, "lowerable 4/4": 1},
    "sigmoid_attention": {"mapped 4/4": 1},
    "single_head": {"lowerable 1/1": 1},
    "sinkhorn": {"mapped 4/4": 1},
    "slot_attention": {"found unmapped 1/1": 1},
    "speecht5_encoder": {"lowerable 4/4": 2},
    "squeeze_excite": {},
    "squeezebert": {"lowerable unmapped 4/4": 2},
    "stablelm": {"lowerable 4/2": 2},
    "swinv2": {"lowerable 2/2": 2, "lowerable 4/4": 2},
    "time_first": {"lowerable 4/4": 1},
    "xlm": {"lowerable 4/4": 2},
    "xlnet": {"lowerable 4/4": 2},
}
# refused for these reasons, by family; every other graph has no problem at all
REASONS = {
    "capsules": {"product-form"},
    "channel_attention": {"lowering-failed"},
    "fastspeech2_conformer": {"bias-depends-on-query"},
    "funnel": {"bias-depends-on-query"},
    "hiera": {"output-layout", "batch-sizes"},
    "lilt": {"old-core-alive"},
    "longformer": {"probabilities-changed"},
    "longt5_local": {"score-rank"},
    "luke": {"not-the-content"},
    "over_heads": {"probabilities-changed"},
    "relative_shift": {"bias-depends-on-query"},
    "sigmoid_attention": {"no-softmax"},
    "sinkhorn": {"probabilities-changed"},
    "slot_attention": {"probabilities-changed"},
    "speecht5_encoder": {"bias-depends-on-query"},
    "xlnet": {"bias-depends-on-query"},
}
RELATIVES = ("over_heads", "sinkhorn", "sigmoid_attention", "slot_attention")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_of_a_family_nobody_tuned_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(MODELS[name], path)
    found = recognise(load(path))
    assert collections.Counter(map(_described, found.attention)) == EXPECTED[name]
    codes = {problem.code for site in found.attention for problem in site.problems}
    assert codes | {entry.refusal.code for entry in found.unrecognised} == REASONS.get(name, set())


def test_the_pack_is_small_and_whole() -> None:
    assert PACK.stat().st_size < 2 * 2**20
    assert set(MODELS) == set(PACKED) == set(EXPECTED)
    assert not any("lowerable" in state for name in RELATIVES for state in EXPECTED[name])


def _described(site: AttentionSite) -> str:
    known = "" if site.mapped else " unmapped"
    return f"{site.state.value}{known} {site.heads}/{site.kv_heads}"
