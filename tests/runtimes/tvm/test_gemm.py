"""The GEMM template over odd sizes, tiles and epilogues, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from rewriter.runtimes.tvm.kernels.gemm import Gemm, Tile, make_gemm, pack
from rewriter.runtimes.tvm.tiles import default_gemm
from tests.runtimes.tvm.harness import numbers, run_kernel, target

CASES = [
    (Gemm((1,), 1, 1), Tile(1, 1, 1)),
    (Gemm((1, 1), 70, 33, bias=True), Tile(1, 4, 8)),
    (Gemm((2, 13), 48, 16), Tile(8, 3, 4)),
    (Gemm((3, 17), 131, 45, bias=True, activation="gelu", residual=True), Tile(12, 2, 4)),
    (Gemm((29,), 50, 7, bias=True, residual=True), Tile(6, 4, 8, block=13)),
    (Gemm((64,), 96, 64, bias=True, activation="relu"), Tile(8, 3, 8, block=32, ahead=False)),
    (Gemm((5, 7), 37, 19, bias=True, activation="relu", lanes=8), Tile(6, 2, 4)),
    (Gemm((2, 3, 4), 21, 11, residual=True, lanes=4), Tile(4, 2, 1)),
    (Gemm((2, 20), 130, 24, bias=True, threads=2), Tile(8, 3, 4)),
    (Gemm((2, 20), 130, 24, bias=True, threads=2), Tile(4, 3, 4, block=20, by_rows=True)),
    (Gemm((3, 15), 50, 9, bias=True, residual=True, threads=2), Tile(8, 3, 4, block=24, by_rows=True)),
]


def reference(gemm: Gemm, a: np.ndarray, b: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    result = a.astype(np.float64) @ b + (bias if gemm.bias else 0.0)
    if gemm.activation == "gelu":
        result = 0.5 * result * (1 + erf(result / np.sqrt(2)))
    if gemm.activation == "relu":
        result = np.maximum(result, 0)
    return result + (residual if gemm.residual else 0.0)


@pytest.mark.parametrize(("gemm", "tile"), CASES, ids=lambda value: str(value)[:60])
def test_matches_float64(gemm: Gemm, tile: Tile) -> None:
    a, b = numbers(*gemm.leading, gemm.K, seed=1), numbers(gemm.K, gemm.N, seed=2)
    bias, residual = numbers(gemm.N, seed=3), numbers(*gemm.leading, gemm.N, seed=4)
    inputs = [
        a,
        pack(b, gemm.lanes * tile.vectors),
        *([bias] if gemm.bias else []),
        *([residual] if gemm.residual else []),
    ]
    (got,) = run_kernel(make_gemm(gemm, tile), inputs, (*gemm.leading, gemm.N))
    np.testing.assert_allclose(got, reference(gemm, a, b, bias, residual), rtol=2e-6, atol=2e-6 * gemm.K**0.5 * 4)


@pytest.mark.parametrize(("rows", "block"), [(128, 64), (197, 104), (13, 7), (8, 0), (1, 0)])
def test_threads_share_rows_where_there_are_enough(rows: int, block: int) -> None:
    tile = default_gemm(Gemm((1, rows), 96, 32, threads=2), target(2))
    assert (tile.block, tile.by_rows) == (block, block > 0)
    assert not default_gemm(Gemm((1, rows), 96, 32), target()).by_rows


def test_packing_pads_with_zeros_and_keeps_every_column() -> None:
    weight = numbers(5, 37)
    packed = pack(weight, 16)
    assert packed.shape == (3, 5, 16)
    flat = packed.transpose(1, 0, 2).reshape(5, 48)
    np.testing.assert_array_equal(flat[:, :37], weight)
    assert not flat[:, 37:].any()
