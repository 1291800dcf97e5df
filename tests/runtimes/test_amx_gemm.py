"""GEMMs on AMX tiles: the machine code that TVM emits, run by the processor or the emulator, against exact numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewriter.runtimes.tvm.gemm_space import GemmSpace
from rewriter.runtimes.tvm.kernels import amx_gemm, gemm_bf16
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision, Tile
from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
from rewriter.runtimes.tvm.tiles import default_gemm
from rewriter.runtimes.workers import Worker, WorkerFailure
from tests.runtimes import amx_emulator
from tests.runtimes.tvm.harness import numbers, run_kernel, target
from tests.runtimes.tvm.test_number_formats import columns_of, finished, levels, operands

JOBS = "tests.runtimes.amx_emulator.jobs"
FORMATS: tuple[Precision, ...] = ("bf16", "int8")
BOTH = (3, 6, 8, 9)  # shapes run in both formats
PLAIN = Tile(0, 2, 1, 0, False, False)
SHAPES = [
    (Gemm((1,), 1, 1), PLAIN),
    (Gemm((1, 1), 70, 33, bias=True), replace(PLAIN, overlap=True)),
    (Gemm((2, 8), 48, 128, residual=True), PLAIN),
    (Gemm((2, 13), 48, 16), replace(PLAIN, overlap=True)),
    (Gemm((3, 17), 131, 45, bias=True, activation="gelu", residual=True), replace(PLAIN, ahead=True, overlap=True)),
    (Gemm((3, 17), 131, 45, bias=True, activation="gelu", residual=True), replace(PLAIN, ahead=True)),
    (Gemm((65,), 96, 300, bias=True, activation="relu"), replace(PLAIN, block=44, overlap=True)),
    (Gemm((5, 20), 130, 24, bias=True, threads=2), replace(PLAIN, ahead=True, overlap=True)),
    (Gemm((33,), 31, 70, residual=True, threads=3), replace(PLAIN, overlap=True)),
    (Gemm((19,), 9, 40, bias=True), replace(PLAIN, overlap=True)),
    (Gemm((4, 33), 256, 64, threads=2), replace(PLAIN, block=54)),
]
# Tiles and loops are the same for both formats; each meets every kind of edge and epilogue in some of the shapes.
CASES = [(shape, tile, FORMATS[(number + extra) % 2]) for extra in (0, 1) for number, (shape, tile) in enumerate(SHAPES)
         if extra == 0 or number in BOTH]  # fmt: skip


@pytest.fixture(scope="module")
def child(amx: Path | None) -> Iterator[Worker]:
    with amx_emulator.worker(amx) as made:
        yield made


def reference(gemm: Gemm, a: np.ndarray, b: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """In float64, of operands rounded as the format says."""
    if gemm.precision == "bf16":
        return finished(gemm, gemm_bf16.rounded(a).astype(np.float64) @ gemm_bf16.rounded(b), bias, residual)
    left, left_scale = levels(a)
    right, right_scale = columns_of(b)
    return finished(gemm, (left @ right) * left_scale * right_scale, bias, residual)


@pytest.mark.parametrize(("shape", "tile", "precision"), CASES, ids=lambda value: str(value)[:60])
def test_every_size_and_epilogue(child: Worker, shape: Gemm, tile: Tile, precision: Precision) -> None:
    gemm = replace(shape, precision=precision, matrix_unit=True)
    tile = replace(tile, rows=amx_gemm.block_rows(gemm.M))
    a, b, bias, residual, extra = operands(gemm)
    a.reshape(-1, gemm.K)[-1] = 0.0
    found = child.call(f"{JOBS}:gemm", gemm, tile, a, b, extra, timeout_s=120)
    assert not isinstance(found, WorkerFailure), found
    got, counts = found
    wanted = reference(gemm, a, b, bias, residual)
    coarse = 1.2e-4 if (gemm.activation, precision) == ("gelu", "int8") else 4e-6 * gemm.K**0.5
    np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=coarse)
    if counts:
        assert_few_instructions(gemm, tile, counts)


def assert_few_instructions(gemm: Gemm, tile: Tile, counts: dict[str, int]) -> None:
    """As many products as the sizes ask for, two for each pair of loads, and tiles configured once a thread."""
    row_blocks = -(-gemm.M // tile.block) if tile.block else 1
    assert counts["ldtilecfg"] == counts["tilerelease"] == gemm.threads * row_blocks
    per_block = (2 if tile.rows > 16 else 1) * -(-gemm.N // 16)
    in_blocks = [min(tile.block, gemm.M - at) for at in range(0, gemm.M, tile.block)] if tile.block else [gemm.M]
    blocks = sum(-(-rows // tile.rows) for rows in in_blocks)
    assert counts["tdpbf16ps"] + counts["tdpb8"] == blocks * per_block * gemm.depth // 16
    assert counts["tilezero"] == counts["tilestore"] == blocks * per_block


def test_large_sums_of_bytes_are_exact(child: Worker) -> None:
    """The most that 32 bits must hold: 2^16 products of the largest levels."""
    gemm = Gemm((2,), 3, 1 << 16, precision="int8", matrix_unit=True)
    a, b = np.ones((2, gemm.K), np.float32), np.ones((gemm.K, 3), np.float32)
    a[:, 0], b[:, 1] = -1.0 / 64, -1.0
    got, _ = child.call(f"{JOBS}:gemm", gemm, replace(PLAIN, rows=2), a, b, [], timeout_s=120)
    np.testing.assert_allclose(got, reference(gemm, a, b, np.zeros(3), np.zeros((2, 3))), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 64, 65, 97, 197, 512])
def test_blocks_cover_all_rows_with_few_twice(rows: int) -> None:
    block = amx_gemm.block_rows(rows)
    count = -(-rows // block)
    assert block <= 32 and count == -(-rows // 32) and block * count - rows < count


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("columns", "multiple"), [(1, 16), (16, 16), (37, 16), (64, 16), (65, 3)])
def test_rows_are_padded_to_whole_tiles(precision: Precision, columns: int, multiple: int) -> None:
    x = numbers(3, columns)
    padded, plain = Quantise(x.shape, precision, multiple=multiple), Quantise(x.shape, precision)

    def words(spec: Quantise) -> np.ndarray:
        shapes, dtypes = zip(*spec.outputs, strict=True)
        return run_kernel(make_quantise(spec), [x], *shapes, dtypes=dtypes)[0]

    got, wanted = words(padded), words(plain)
    assert got.shape[-1] % multiple == 0 and got.shape[-1] - wanted.shape[-1] < multiple
    np.testing.assert_array_equal(got[:, : wanted.shape[-1]], wanted)
    assert precision == "int8" or not got[:, wanted.shape[-1] :].any()  # NaN would spoil sums, bytes meet zeros


def test_tiles_by_default_and_to_be_measured() -> None:
    spec = Gemm((128,), 384, 1536, precision="bf16", matrix_unit=True)
    tile = default_gemm(spec, target())
    assert (tile.rows, tile.vectors, tile.overlap) == (32, 2, True)
    found = GemmSpace.of(spec, target()).choices()
    assert found[0] == tile and len(set(found)) == len(found) > 1 and all(one.vectors == 2 for one in found)
