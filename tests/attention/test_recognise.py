from __future__ import annotations

import numpy as np
import pytest

from rewriter.attention.recognise import recognise
from rewriter.core.errors import DataError
from rewriter.core.site import State
from tests.attention import exported

CASES = {
    "bert eager": (lambda: exported.bert("eager"), 2, 4, 4, "padding", False, "none", "gelu"),
    "bert sdpa": (lambda: exported.bert("sdpa"), 2, 4, 4, "padding", False, "none", "gelu"),
    "bert dynamo": (lambda: exported.bert("sdpa", True), 2, 4, 4, "padding", False, "none", "gelu"),
    "gpt2": (exported.gpt2, 2, 4, 4, "causal", True, "none", "gelu_tanh"),
    "llama": (exported.llama, 2, 4, 2, "causal", True, "rotary", "silu"),
    "vit": (exported.vit, 2, 4, 4, "none", False, "none", "gelu"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_is_lowerable_and_described(name: str) -> None:
    build, blocks, heads, kv_heads, mask, causal, position, activation = CASES[name]
    result = exported.recognised(build())
    assert not result.unrecognised
    assert len(result.attention) == len(result.feed_forward) == blocks
    for site in result.attention:
        assert site.state is State.LOWERABLE, site.problems
        assert (site.heads, site.kv_heads, site.qk_dim, site.v_dim) == (heads, kv_heads, 6, 6)
        assert (site.mask, site.causal, site.position, site.cross) == (mask, causal, position, False)
        assert site.scale == pytest.approx(6**-0.5, rel=1e-6)
    for block in result.feed_forward:
        assert block.state is State.LOWERABLE, block.problems
        assert (block.activation, block.width) == (activation, 40)
        assert (block.gate_CF is not None) == (name == "llama")


def test_grouped_queries_read_their_own_key_heads() -> None:
    site = exported.recognised(exported.llama()).attention[0]
    assert site.key.head_of == site.value.head_of == (0, 0, 1, 1)
    assert site.query.rotary is not None
    assert site.query.rotary.size == 6
    assert not site.query.rotary.interleaved


def test_soft_cap_window_and_scale_of_gemma2() -> None:
    result = exported.recognised(exported.gemma2())
    assert [site.softcap for site in result.attention] == [50.0, 50.0]
    assert [site.scale for site in result.attention] == [0.25, 0.25]
    assert [site.mask for site in result.attention] == ["window", "causal"]
    assert all(site.state is State.LOWERABLE for site in result.attention)
    assert all(block.gate_CF is not None for block in result.feed_forward)


def test_t5_has_no_scale_a_bias_and_cross_attention() -> None:
    result = exported.recognised(exported.t5())
    kinds = [(site.cross, site.causal, site.position) for site in result.attention]
    assert kinds[-2:] == [(False, True, "bias"), (True, False, "none")]
    assert set(kinds[:-2]) == {(False, False, "bias")}
    assert all(site.scale == 1.0 and site.state is State.LOWERABLE for site in result.attention)


def test_weights_are_those_of_the_model() -> None:
    graph = exported.bert("eager")
    site = exported.recognised(graph).attention[0]
    weight = graph.constant(site.query.weight_name)
    assert weight is not None
    assert site.query.weight_CGD is not None
    assert np.array_equal(site.query.weight_CGD.reshape(24, 24), weight)
    assert site.query.weight_CGD.dtype == np.float32


def test_head_norm_is_found() -> None:
    site = exported.recognised(exported.block(norm=True)).attention[0]
    assert site.state is State.LOWERABLE, site.problems
    assert site.query.norm is not None
    assert site.query.norm.kind == "layer"
    assert site.query.norm.epsilon == pytest.approx(1e-5, rel=1e-6)


def test_exposed_probabilities_are_mapped_but_not_lowerable() -> None:
    (site,) = exported.recognised(exported.block(exposed=True)).attention
    assert site.state is State.MAPPED
    assert site.escapes == ("weights",)
    assert [problem.code for problem in site.problems] == ["exposed-probabilities"]


def test_a_gate_after_the_values_makes_them_the_result() -> None:
    (site,) = exported.recognised(exported.block(gated=True)).attention
    assert site.state is State.LOWERABLE
    assert site.output is not None
    assert site.output.bare
    assert not site.output.weight_name


def test_head_mixing_is_found_not_rewritten() -> None:
    result = exported.recognised(exported.block(mixing=True))
    (site,) = result.attention
    assert not result.unrecognised
    assert site.state is State.FOUND
    assert (site.heads, site.qk_dim, site.v_dim) == (4, 6, 6)
    assert [problem.code for problem in site.problems] == ["head-mixing"]


@pytest.mark.parametrize("kind", ["router", "linear attention"])
def test_other_softmaxes_give_nothing(kind: str) -> None:
    result = exported.recognised(exported.negative(kind))
    assert not result.attention
    assert not result.unrecognised


def test_an_example_may_be_given() -> None:
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, 61, (1, 40)), "attention_mask": np.ones((1, 40), np.int64)}
    result = recognise(exported.bert("eager"), feeds)
    assert [site.state for site in result.sites] == [State.LOWERABLE] * 4
    assert result.attention[0].mask == "padding"


def test_a_missing_input_is_named() -> None:
    with pytest.raises(DataError, match="attention_mask"):
        recognise(exported.bert("eager"), {"input_ids": np.ones((2, 9), np.int64)})


def test_ids_count_in_data_flow_order() -> None:
    ids = [site.id for site in exported.recognised(exported.bert("eager")).sites]
    assert ids == ["layers.0.attention", "layers.0.feed_forward", "layers.1.attention", "layers.1.feed_forward"]
