"""com.microsoft operators against ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rewriter.core.errors import UnsupportedOperator
from tests.graph.harness import compare, numbers, one_node, ours, whole

MS = "com.microsoft"


def lengths(*items: int) -> np.ndarray:
    return np.array(items, dtype=np.int32)


@pytest.mark.parametrize("op", ["Gelu", "QuickGelu", "FastGelu"])
def test_gelus(op: str) -> None:
    compare(op, [numbers(2, 3, 4)], domain=MS)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_gelus_of_sums(op: str) -> None:
    compare(op, [numbers(2, 3, 4), numbers(4, seed=1)], domain=MS)


@pytest.mark.parametrize("full", [False, True])
def test_skip_norms(full: bool) -> None:
    x, skip, gain, beta, bias = numbers(2, 3, 8), *(numbers(*s, seed=1) for s in ((2, 3, 8), (8,), (8,), (8,)))
    outputs = ("y0", "", "", "y3") if full else ("y0",)
    extra = [beta, bias] if full else []
    compare("SkipLayerNormalization", [x, skip, gain, *extra], domain=MS, outputs=outputs, epsilon=1e-5)
    extra = [bias] if full else []
    compare("SkipSimplifiedLayerNormalization", [x, skip, gain, *extra], domain=MS, outputs=outputs, epsilon=1e-5)


def test_simplified_norm() -> None:
    compare("SimplifiedLayerNormalization", [numbers(2, 3, 8), numbers(8, seed=1)], runtime=True, epsilon=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "flags"),
    [
        ((2, 3, 4), (2, 4, 5), {}),
        ((2, 4, 3), (2, 5, 4), {"transA": 1, "transB": 1}),
        ((3, 2, 4), (2, 4, 5), {"transBatchA": 1}),
        ((2, 3, 4), (4, 2, 5), {"transBatchB": 1}),
        ((3, 4, 2, 5), (4, 2, 5, 6), {"transBatchA": 1}),
        ((3, 2, 5, 4), (5, 3, 2, 6), {"transBatchB": 1, "transA": 1}),
    ],
)
def test_fused_matmul(a: tuple[int, ...], b: tuple[int, ...], flags: dict[str, int]) -> None:
    compare("FusedMatMul", [numbers(*a), numbers(*b, seed=1)], domain=MS, alpha=0.5, **flags)


@pytest.mark.parametrize("mask", [None, lengths(5, 3), whole(2, 5, low=0, high=2, dtype=np.int32)])
@pytest.mark.parametrize("biased", [False, True])
def test_multi_head_attention(mask: np.ndarray | None, biased: bool) -> None:
    q, k, v = numbers(2, 3, 8), numbers(2, 5, 8, seed=1), numbers(2, 5, 12, seed=2)
    bias = numbers(28, seed=3) if biased else None
    compare("MultiHeadAttention", [q, k, v, bias, mask], domain=MS, num_heads=2)
    compare("MultiHeadAttention", [q, k, v, bias, mask, numbers(1, 2, 3, 5)], domain=MS, num_heads=2, scale=0.2)


def test_multi_head_attention_with_a_past() -> None:
    q, k, v = (numbers(2, 3, 8, seed=i) for i in range(3))
    past = [numbers(2, 2, 4, 4, seed=i) for i in (3, 4)]
    outputs = ("y0", "y1", "y2")
    compare("MultiHeadAttention", [q, k, v, None, None, None, *past], domain=MS, num_heads=2, outputs=outputs)


def test_multi_head_attention_causal_and_cross() -> None:
    q, k, v = (numbers(2, 4, 8, seed=i) for i in range(3))
    compare("MultiHeadAttention", [q, k, v], domain=MS, num_heads=2, unidirectional=1)
    compare("MultiHeadAttention", [q, numbers(2, 2, 5, 4), numbers(2, 2, 5, 4, seed=3)], domain=MS, num_heads=2)


PACKED_MASKS = [
    None,
    lengths(4, 2),
    lengths(4, 3, 1, 0),
    np.array([[1, 1, 0, 1], [0, 1, 1, 1]], np.int32),
    np.tril(np.ones((2, 4, 4), np.int32)),
]


@pytest.mark.parametrize("mask", PACKED_MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_packed_attention(mask: np.ndarray | None, causal: int) -> None:
    x, weight, bias = numbers(2, 4, 6), numbers(6, 24, seed=1), numbers(24, seed=2)
    compare("Attention", [x, weight, bias, mask], domain=MS, num_heads=2, unidirectional=causal)


def test_packed_attention_variants() -> None:
    x, weight, bias = numbers(2, 4, 6), numbers(6, 28, seed=1), numbers(28, seed=2)
    compare("Attention", [x, weight, bias], domain=MS, num_heads=2, qkv_hidden_sizes=[8, 8, 12], scale=0.4)
    x, weight, bias = numbers(2, 4, 6), numbers(6, 24, seed=1), numbers(24, seed=2)
    past, extra = numbers(2, 2, 2, 3, 4, seed=3), numbers(2, 2, 4, 4, seed=4)
    compare("Attention", [x, weight, bias, None, past], domain=MS, num_heads=2, outputs=("y0", "y1"))
    compare("Attention", [x, weight, bias, None, None, extra], domain=MS, num_heads=2)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    cos, sin = numbers(9, 4), numbers(9, 4, seed=1)
    places = whole(2, 3, low=0, high=9)
    compare("RotaryEmbedding", [numbers(2, 3, 16), places, cos, sin], domain=MS, interleaved=interleaved)
    compare("RotaryEmbedding", [numbers(2, 2, 3, 8), np.array([2]), cos, sin], domain=MS, interleaved=interleaved)


def test_embedding_norm() -> None:
    ids, segments = whole(2, 4, low=0, high=9, dtype=np.int32), whole(2, 4, low=0, high=2, dtype=np.int32)
    words, places, kinds = numbers(9, 8), numbers(6, 8, seed=1), numbers(2, 8, seed=2)
    gain, beta = numbers(8, seed=3), numbers(8, seed=4)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)
    compare(
        "EmbedLayerNormalization",
        [ids, segments, words, places, kinds, gain, beta, mask],
        domain=MS,
        outputs=("y0", "y1", "y2"),
    )


GROUPED: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0, "scale": 0.3},
    {"local_window_size": 2},
    {"do_rotary": 1},
    {"do_rotary": 1, "rotary_interleaved": 1},
]


@pytest.mark.parametrize("attributes", GROUPED)
def test_grouped_query_attention_of_a_prompt(attributes: dict[str, Any]) -> None:
    q, k, v = numbers(2, 4, 64), numbers(2, 4, 32, seed=1), numbers(2, 4, 32, seed=2)
    inputs: list[np.ndarray | None] = [q, k, v, None, None, lengths(3, 3), np.array(4, np.int32)]
    if attributes.get("do_rotary"):
        inputs += [numbers(16, 8, seed=3), numbers(16, 8, seed=4)]
    compare(
        "GroupQueryAttention",
        inputs,
        domain=MS,
        outputs=("y0", "y1", "y2"),
        num_heads=4,
        kv_num_heads=2,
        **attributes,
    )


@pytest.mark.parametrize("attributes", GROUPED)
def test_grouped_query_attention_of_a_new_token(attributes: dict[str, Any]) -> None:
    q, k, v = numbers(2, 1, 64), numbers(2, 1, 32, seed=1), numbers(2, 1, 32, seed=2)
    past = [numbers(2, 2, 5, 16, seed=i) for i in (5, 6)]
    inputs: list[np.ndarray | None] = [q, k, v, *past, lengths(5, 5), np.array(6, np.int32)]
    if attributes.get("do_rotary"):
        inputs += [numbers(16, 8, seed=3), numbers(16, 8, seed=4)]
    compare(
        "GroupQueryAttention",
        inputs,
        domain=MS,
        outputs=("y0", "y1", "y2"),
        num_heads=4,
        kv_num_heads=2,
        **attributes,
    )


def test_quantised_products() -> None:
    a, b = whole(3, 4, low=0, high=255, dtype=np.uint8), whole(4, 5, low=-128, high=127, dtype=np.int8)
    scale, zero = np.array([0.02], np.float32), np.array([7], np.uint8)
    scales, zeros, bias = np.abs(numbers(5)) / 50, np.zeros(5, np.int8), numbers(5, seed=3)
    compare("MatMulIntegerToFloat", [a, b, scale, scales, zero, zeros, bias], domain=MS)
    compare("MatMulIntegerToFloat", [a, b, scale, scale, zero], domain=MS)
    compare("DynamicQuantizeMatMul", [numbers(3, 4), b, scales, zeros, bias], domain=MS, constant=(1, 2, 3))
    compare("DynamicQuantizeMatMul", [numbers(3, 4), b, scale], domain=MS)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeroed", [False, True])
def test_weights_of_few_bits(bits: int, zeroed: bool) -> None:
    inner, width, block = 40, 6, 32
    packed = whole(width, 2, block * bits // 8, low=0, high=256, dtype=np.uint8)
    scales = np.abs(numbers(width, 2)) / 10
    zeros = whole(width, 2 * bits // 8, low=0, high=256, seed=1, dtype=np.uint8) if zeroed else None
    compare(
        "MatMulNBits",
        [numbers(3, inner), packed, scales, zeros],
        domain=MS,
        constant=(1, 2, 3) if zeroed else (1, 2),
        tolerance=1e-3,
        bits=bits,
        block_size=block,
        K=inner,
        N=width,
    )


def test_forms_that_are_not_run_say_so() -> None:
    q = numbers(1, 2, 8)
    feeds = {"x0": q}
    with pytest.raises(UnsupportedOperator, match=r"MultiHeadAttention.*not packed"):
        ours(one_node("MultiHeadAttention", [q], 20, domain=MS, num_heads=2), feeds)
