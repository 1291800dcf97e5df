"""GEMMs of bfloat16 and 8-bit integers and what feeds them, against float64 models of their rounding."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from rewriter.runtimes.tvm.kernels import formats, gemm_bf16, gemm_int8
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Tile
from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
from tests.runtimes.tvm.harness import needs, numbers, run_kernel

SHAPES = [
    (Gemm((1,), 1, 1), Tile(1, 1, 1)),
    (Gemm((1, 1), 70, 33, bias=True), Tile(1, 4, 8)),
    (Gemm((2, 13), 48, 16), Tile(8, 3, 4)),
    (Gemm((3, 17), 131, 45, bias=True, activation="gelu", residual=True), Tile(12, 2, 4)),
    (Gemm((29,), 50, 7, residual=True), Tile(6, 4, 8, block=13)),
    (Gemm((64,), 96, 66, bias=True, activation="relu"), Tile(8, 3, 8, block=32, ahead=False)),
    (Gemm((2, 20), 130, 24, bias=True, threads=2), Tile(8, 3, 4)),
]


def finished(gemm: Gemm, result: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The epilogue in float64."""
    result = result + (bias if gemm.bias else 0.0)
    if gemm.activation == "gelu":
        result = 0.5 * result * (1 + erf(result / np.sqrt(2)))
    if gemm.activation == "relu":
        result = np.maximum(result, 0)
    return result + (residual if gemm.residual else 0.0)


def operands(gemm: Gemm) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    a, b = numbers(*gemm.leading, gemm.K, seed=1), numbers(gemm.K, gemm.N, seed=2)
    bias, residual = numbers(gemm.N, seed=3), numbers(*gemm.leading, gemm.N, seed=4)
    return a, b, bias, residual, [*([bias] if gemm.bias else []), *([residual] if gemm.residual else [])]


def levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(levels less zero point, scale) of every row, as the definition says."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    span = np.maximum(high - low, np.float32(1e-30))
    inverse = (np.float32(254) / span).astype(np.float64)
    zero = np.rint(-low * inverse)
    return np.rint(x * inverse + zero) - zero, span.astype(np.float64) / 254


def columns_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(levels, scale) of every column."""
    largest = np.abs(weight).max(0)
    return np.rint(weight * (np.float32(127) / largest)), largest.astype(np.float64) / 127


def run_rounding(spec: Quantise, x: np.ndarray) -> list[np.ndarray]:
    shapes, dtypes = zip(*spec.outputs, strict=True)
    return run_kernel(make_quantise(spec), [x], *shapes, dtypes=dtypes)


@needs(gemm_int8.FEATURE)
@pytest.mark.parametrize(("shape", "tile"), SHAPES, ids=lambda value: str(value)[:60])
def test_int8_is_exact_up_to_its_epilogue(shape: Gemm, tile: Tile) -> None:
    gemm = Gemm(**{**vars(shape), "precision": "int8"})
    a, b, bias, residual, extra = operands(gemm)
    a.reshape(-1, gemm.K)[-1] = 0.0
    spec, width = Quantise(a.shape, "int8"), 16 * tile.vectors
    rounded = run_rounding(spec, a)
    inputs = [*rounded, *formats.weight_operands(b, "int8", "int8", width), *extra]
    (got,) = run_kernel(gemm_int8.make_gemm_int8(gemm, tile), inputs, (*gemm.leading, gemm.N))
    left, left_scale = levels(a)
    right, right_scale = columns_of(b)
    wanted = finished(gemm, (left @ right) * left_scale * right_scale, bias, residual)
    coarse = 5e-6 if gemm.activation == "gelu" else 3e-6
    np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=coarse)


@needs(gemm_bf16.FEATURE)
@pytest.mark.parametrize(("shape", "tile"), SHAPES, ids=lambda value: str(value)[:60])
def test_bf16_rounds_its_operands_only(shape: Gemm, tile: Tile) -> None:
    gemm = Gemm(**{**vars(shape), "precision": "bf16"})
    a, b, bias, residual, extra = operands(gemm)
    spec = Quantise(a.shape, "bf16")
    (words,) = run_rounding(spec, a)
    inputs = [words, gemm_bf16.pack_bf16(b, 16 * tile.vectors), *extra]
    (got,) = run_kernel(gemm_bf16.make_gemm_bf16(gemm, tile), inputs, (*gemm.leading, gemm.N))
    product = gemm_bf16.rounded(a).astype(np.float64) @ gemm_bf16.rounded(b)
    wanted = finished(gemm, product, bias, residual)
    # GELU is rounded to bfloat16 next, whose steps are 4e-3 of a number.
    coarse = 5e-6 if gemm.activation == "gelu" else 0.0
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=4e-6 * gemm.K**0.5 + coarse)


@pytest.mark.parametrize("columns", [1, 15, 16, 37, 64])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_rows_become_bytes(columns: int, lanes: int) -> None:
    x = numbers(2, 3, columns) * np.float32(10.0) ** numbers(2, 3, 1, seed=9)
    x[0, 0], x[1, 1, 0], x[1, 2] = 0.0, -4096.0, np.abs(x[1, 2]) + 3
    spec = Quantise(x.shape, "int8", lanes)
    words, scales, zeros = run_rounding(spec, x)
    wanted, scale = levels(x)
    held = words.view(np.uint8).reshape(2, 3, -1).astype(int) - zeros[..., None]
    assert not held[..., columns:].any() and held.shape[-1] < columns + 4
    np.testing.assert_array_equal(held[..., :columns], wanted)
    (numbers_meant,) = run_rounding(Quantise(x.shape, "int8", lanes, unpacked=True), x)
    np.testing.assert_allclose(numbers_meant, wanted * scale, rtol=1e-6)
    np.testing.assert_allclose(scales, scale[..., 0], rtol=1e-6)


def test_rows_become_bfloat16() -> None:
    x = numbers(3, 37)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FC00001, 0x7F800001, 0xFF800000], np.uint32)
    x[1, : len(ties)] = ties.view(np.float32)
    spec = Quantise(x.shape, "bf16")
    (words,) = run_rounding(spec, x)
    held = words.view(np.uint16).reshape(3, 38)
    rows = (held[:, :37].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(rows, gemm_bf16.rounded(x))
    assert (held[:, 37] == 0).all()
    np.testing.assert_array_equal(held[1, :4], [0x3F80, 0x3F82, 0x3F81, 0x7F80])


def test_idle_columns_have_no_scale() -> None:
    weight = numbers(6, 4)
    weight[:, 2] = 0.0
    found = gemm_int8.Quantised.of(weight)
    assert found.scale_N[2] == 0.0 and not found.levels_KN[:, 2].any()
    assert np.abs(found.levels_KN[:, :2]).max() == 127
