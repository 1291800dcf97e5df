"""Products, convolutions, pooling, resizing, norms, attention and quantised operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from rewriter.core.errors import UnsupportedOperator
from tests.graph.harness import compare, i64, numbers, one_node, ours, whole


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((4,), (4, 5))])
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    compare("MatMul", [numbers(*shapes[0]), numbers(*shapes[1], seed=1)])


@pytest.mark.parametrize("flip_a", [0, 1])
@pytest.mark.parametrize("flip_b", [0, 1])
def test_gemm(flip_a: int, flip_b: int) -> None:
    a, b = numbers(*((4, 3) if flip_a else (3, 4))), numbers(*((5, 4) if flip_b else (4, 5)), seed=1)
    compare("Gemm", [a, b, numbers(5, seed=2)], transA=flip_a, transB=flip_b, alpha=0.5, beta=2.0)
    compare("Gemm", [a, b], transA=flip_a, transB=flip_b)


@pytest.mark.parametrize("equation", ["bij, bjk -> bik", "bshd,bthd->bhst", "ij->ji"])
def test_einsum(equation: str) -> None:
    shapes = {"bij, bjk -> bik": [(2, 3, 4), (2, 4, 5)], "bshd,bthd->bhst": [(2, 3, 2, 4), (2, 5, 2, 4)]}
    compare("Einsum", [numbers(*shape) for shape in shapes.get(equation, [(3, 4)])], equation=equation)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1], "pads": [1, 0, 1, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
    ],
)
def test_conv(attributes: dict[str, Any]) -> None:
    compare("Conv", [numbers(1, 2, 7, 8), numbers(3, 2, 3, 3, seed=1), numbers(3, seed=2)], **attributes)


def test_conv_in_groups_and_one_axis() -> None:
    compare("Conv", [numbers(1, 4, 9), numbers(4, 2, 3, seed=1)], group=2)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2]},
        {"strides": [2, 2], "pads": [1, 0, 0, 1]},
        {"strides": [2, 2], "output_padding": [1, 1]},
        {"strides": [3, 2], "output_shape": [10, 8]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"dilations": [2, 2]},
    ],
)
def test_conv_transpose(attributes: dict[str, Any]) -> None:
    x, weight = numbers(1, 2, 3, 4), numbers(2, 3, 3, 3, seed=1)
    compare("ConvTranspose", [x, weight, numbers(3, seed=2)], runtime=True, **attributes)


POOLS = [
    {"kernel_shape": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]},
    {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 2], "dilations": [2, 2]},
]


@pytest.mark.parametrize("attributes", POOLS)
def test_max_pool(attributes: dict[str, Any]) -> None:
    compare("MaxPool", [numbers(2, 2, 6, 7)], outputs=("y0", "y1"), runtime=True, **attributes)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("attributes", POOLS)
def test_average_pool(attributes: dict[str, Any], include: int) -> None:
    compare("AveragePool", [numbers(2, 2, 6, 7)], runtime=True, count_include_pad=include, **attributes)


def test_pooling_whole_planes_and_integers() -> None:
    compare("GlobalAveragePool", [numbers(2, 3, 4, 5)])
    compare("GlobalMaxPool", [numbers(2, 3, 4, 5)])
    compare("MaxPool", [whole(1, 1, 4, 4, dtype=np.int8)], runtime=True, kernel_shape=[2, 2], strides=[2, 2])


@pytest.mark.parametrize(
    "mode", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"]
)
@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scale", [0.6, 2.0])
def test_resize_by_scales(mode: str, kind: str, scale: float) -> None:
    scales = np.array([1, 1, scale, scale], np.float32)
    # The reference evaluator lets align_corners see fractional sizes; ONNX Runtime follows the text of the standard.
    compare(
        "Resize",
        [numbers(1, 2, 5, 4), None, scales],
        opset=19,
        runtime=mode == "align_corners",
        coordinate_transformation_mode=mode,
        mode=kind,
    )


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("attributes", [{"antialias": 1}, {"exclude_outside": 1}])
def test_resize_weights(kind: str, attributes: dict[str, Any]) -> None:
    compare("Resize", [numbers(1, 1, 6, 7), None, None, i64(1, 1, 3, 4)], opset=19, mode=kind, **attributes)


@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_resize_nearest_rounding(nearest: str) -> None:
    compare("Resize", [numbers(1, 1, 4, 6), None, None, i64(1, 1, 7, 3)], opset=13, nearest_mode=nearest)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_resize_some_axes(policy: str) -> None:
    sizes = i64(7, 9)
    compare("Resize", [numbers(1, 1, 4, 6), None, None, sizes], opset=18, axes=[2, 3], keep_aspect_ratio_policy=policy)


def test_resize_crops() -> None:
    roi = np.array([0, 0, 0.2, -0.1, 1, 1, 0.8, 0.9], np.float32)
    x = numbers(1, 1, 5, 6)
    mode = "tf_crop_and_resize"
    compare("Resize", [x, roi, None, i64(1, 1, 4, 4)], opset=13, mode="linear", coordinate_transformation_mode=mode)


@pytest.mark.parametrize("kind", ["nearest", "linear"])
def test_resize_before_opset_11(kind: str) -> None:
    scales = np.array([1, 1, 2, 1.5], np.float32)
    compare("Resize", [numbers(1, 1, 4, 6), scales], opset=10, runtime=True, mode=kind)
    compare("Upsample", [numbers(1, 1, 4, 6), scales], opset=9, runtime=True, mode=kind)
    compare("Upsample", [numbers(1, 1, 4, 6)], opset=8, runtime=True, mode=kind, scales=[1.0, 1.0, 2.0, 1.5])


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm(axis: int) -> None:
    shape = (4,) if axis == -1 else (3, 4)
    inputs = [numbers(2, 3, 4), numbers(*shape, seed=1), numbers(*shape, seed=2)]
    compare("LayerNormalization", inputs, outputs=("y0", "y1", "y2"), axis=axis)
    compare("LayerNormalization", inputs[:2], axis=axis, epsilon=1e-3)


def test_rms_norm() -> None:
    compare("RMSNormalization", [numbers(2, 3, 4), numbers(4, seed=1)], opset=23, epsilon=1e-3)


def test_channel_norms() -> None:
    x, gain, bias = numbers(2, 4, 5, 3), numbers(4, seed=1), numbers(4, seed=2)
    compare("BatchNormalization", [x, gain, bias, numbers(4, seed=3), np.abs(numbers(4, seed=4))], opset=15)
    compare("InstanceNormalization", [x, gain, bias], opset=13)
    compare("GroupNormalization", [x, gain, bias], opset=21, num_groups=2)
    compare("GroupNormalization", [x, gain[:2], bias[:2]], opset=18, num_groups=2, runtime=True)
    compare("MeanVarianceNormalization", [x], opset=13)
    compare("LRN", [numbers(2, 6, 3, 3)], runtime=True, size=3, alpha=0.5, beta=0.7, bias=1.5)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalisation(p: int) -> None:
    compare("LpNormalization", [numbers(3, 4)], runtime=True, axis=1, p=p)


def test_batch_norm_in_training_is_refused() -> None:
    inputs = [numbers(2, 4, 3)] + [np.abs(numbers(4, seed=i)) for i in range(4)]
    with pytest.raises(UnsupportedOperator, match="training"):
        ours(one_node("BatchNormalization", inputs, 15, training_mode=1), {f"x{i}": a for i, a in enumerate(inputs)})


def test_attention_on_four_axes() -> None:
    q, k, v = numbers(2, 4, 3, 8), numbers(2, 2, 5, 8, seed=1), numbers(2, 2, 5, 6, seed=2)
    compare("Attention", [q, k, v], opset=23, outputs=("y0",))
    compare("Attention", [q, k, v, numbers(3, 5, seed=3)], opset=23, scale=0.3, softcap=2.0)
    compare("Attention", [q, k, v, numbers(2, 1, 3, 5, seed=3) > 0], opset=23, is_causal=1)


def test_attention_on_three_axes_with_a_past() -> None:
    q, k, v = numbers(2, 3, 16), numbers(2, 3, 8, seed=1), numbers(2, 3, 8, seed=2)
    past = [numbers(2, 2, 4, 4, seed=3), numbers(2, 2, 4, 4, seed=4)]
    compare(
        "Attention",
        [q, k, v, None, *past],
        opset=23,
        outputs=("y0", "y1", "y2"),
        is_causal=1,
        q_num_heads=4,
        kv_num_heads=2,
    )


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_attention_scores_output(mode: int) -> None:
    q, k, v = numbers(1, 2, 3, 4), numbers(1, 2, 5, 4, seed=1), numbers(1, 2, 5, 4, seed=2)
    compare(
        "Attention",
        [q, k, v, numbers(3, 5, seed=3)],
        opset=24,
        outputs=("y0", "", "", "y3"),
        runtime=True,  # the reference evaluator applies the soft-cap in mode 0 too
        softcap=3.0,
        qk_matmul_output_mode=mode,
    )


@pytest.mark.parametrize("window", [{"left_window_size": 1}, {"left_window_size": 2, "right_window_size": 0}])
def test_attention_windows(window: dict[str, int]) -> None:
    newest = onnx.defs.get_schema("Attention")
    if "left_window_size" not in newest.attributes:
        pytest.skip("this version of onnx does not know windows yet")
    q, k, v = numbers(1, 2, 4, 4), numbers(1, 2, 4, 4, seed=1), numbers(1, 2, 4, 4, seed=2)
    compare("Attention", [q, k, v], opset=newest.since_version, **window)


def test_attention_with_valid_lengths_and_masked_rows() -> None:
    q, k, v = numbers(2, 2, 3, 4), numbers(2, 2, 5, 4, seed=1), numbers(2, 2, 5, 4, seed=2)
    compare("Attention", [q, k, v, None, None, None, i64(3, 5)], opset=24)
    mask = np.ones((3, 5), bool)
    mask[1] = False
    found = compare("Attention", [q, k, v, mask], opset=23)
    assert np.all(found[0][:, :, 1] == 0)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    cos, sin = numbers(9, 4), numbers(9, 4, seed=1)
    places = whole(2, 3, low=0, high=9)
    compare("RotaryEmbedding", [numbers(2, 5, 3, 8), cos, sin, places], opset=23, interleaved=interleaved)
    compare("RotaryEmbedding", [numbers(2, 3, 16), cos, sin, places], opset=23, interleaved=interleaved, num_heads=2)
    compare(
        "RotaryEmbedding",
        [numbers(2, 5, 3, 10), cos, sin, places],
        opset=23,
        interleaved=interleaved,
        rotary_embedding_dim=8,
    )
    compare("RotaryEmbedding", [numbers(2, 5, 3, 8), numbers(2, 3, 4), numbers(2, 3, 4, seed=1)], opset=23)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantise_and_back(dtype: Any) -> None:
    x, scale = 50 * numbers(3, 4), np.array(0.4, np.float32)
    compare("QuantizeLinear", [x, scale, np.array(3, dtype)], opset=13, runtime=True)
    compare(
        "DequantizeLinear",
        [whole(3, 4, low=0, high=100, dtype=dtype), scale, np.array(3, dtype)],
        opset=13,
        runtime=True,
    )
    scales, zeros = np.abs(numbers(4)) + 0.1, whole(4, low=0, high=5, dtype=dtype)
    compare("QuantizeLinear", [x, scales, zeros], opset=13, runtime=True, axis=1)
    compare(
        "DequantizeLinear", [whole(3, 4, low=0, high=100, dtype=dtype), scales, zeros], opset=13, runtime=True, axis=-1
    )


def test_quantise_in_blocks() -> None:
    scales = np.abs(numbers(3, 2)) + 0.1
    compare("DequantizeLinear", [whole(3, 4, dtype=np.int8), scales], opset=21, axis=1, block_size=2)


def test_dynamic_quantise_and_integer_products() -> None:
    compare("DynamicQuantizeLinear", [numbers(3, 4)], outputs=("y0", "y1", "y2"), opset=13)
    a, b = whole(3, 4, low=0, high=255, dtype=np.uint8), whole(4, 5, low=-128, high=127, seed=1, dtype=np.int8)
    compare("MatMulInteger", [a, b], opset=13)
    compare("MatMulInteger", [a, b, np.array(7, np.uint8), np.array(3, np.int8)], opset=13)
    compare("MatMulInteger", [a, b, np.array(7, np.uint8), whole(5, dtype=np.int8)], opset=13, runtime=True)
    compare(
        "ConvInteger",
        [whole(1, 2, 5, 5, low=0, high=255, dtype=np.uint8), whole(3, 2, 3, 3, low=0, high=255, dtype=np.uint8)],
        opset=13,
        runtime=True,
        pads=[1, 1, 1, 1],
    )


def test_quantised_matmul() -> None:
    a, b = whole(3, 4, low=0, high=255, dtype=np.uint8), whole(4, 5, low=0, high=255, seed=1, dtype=np.uint8)
    zero = np.array(120, np.uint8)
    compare(
        "QLinearMatMul",
        [a, np.float32(0.02), zero, b, np.float32(0.01), zero, np.float32(0.05), zero],
        opset=13,
    )
