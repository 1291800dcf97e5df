"""Attention whose products run on AMX tiles, against float64: odd sizes, grouped heads, hostile masks, blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewriter.runtimes.tvm.kernels import amx_flash, gemm_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand
from rewriter.runtimes.tvm.kernels.gemm_bf16 import rounded
from rewriter.runtimes.workers import Worker, WorkerFailure
from tests.runtimes import amx_emulator
from tests.runtimes.tvm.harness import needs, numbers
from tests.runtimes.tvm.test_flash import Case, laid_out, make_mask, reference

JOBS = "tests.runtimes.amx_emulator.jobs"
CASES = [
    Case(1, 32, 32, 2, 2, 16, 16, mask="causal"),
    Case(3, 19, 37, 4, 2, 20, 12, mask="holes and an empty row", softcap=5.0),
    Case(2, 45, 50, 3, 3, 33, 40, mask="bool per head", four=True, threads=2),
    Case(1, 16, 300, 3, 2, 8, 70, mask="left padding, lowest float", heads=(1, 0, 1)),
    Case(1, 70, 70, 2, 1, 64, 64, mask="bool causal", threads=2),
    Case(1, 33, 300, 2, 2, 96, 32),
]


@pytest.fixture(scope="module")
def child(amx: Path | None) -> Iterator[Worker]:
    with amx_emulator.worker(amx, threads=2) as made:
        yield made


@needs(gemm_bf16.FEATURE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.B}x{case.S}x{case.T} {case.mask}")
def test_both_products_on_tiles(child: Worker, case: Case) -> None:
    q = numbers(case.B, case.H, case.S, case.D, seed=1)
    k, v = numbers(case.B, case.G, case.T, case.D, seed=2), numbers(case.B, case.G, case.T, case.Dv, seed=3)
    mask, scale = make_mask(case), np.float32(case.D**-0.5)
    arrays = [laid_out(case, x) for x in (q, k, v)]
    operands = [Operand.of(array.shape, heads) for array, heads in zip(arrays, (case.H, case.G, case.G), strict=True)]
    bias = None if mask is None else Bias(mask.shape, "bool" if mask.dtype == bool else "add")
    spec = Attention(
        case.B, case.S, case.T, *operands, tuple(range(case.H)), case.head_of, case.head_of, case.D**-0.5,
        case.softcap, bias, case.empty, threads=case.threads,
    )  # fmt: skip
    inputs = [*arrays, *([] if mask is None else [mask])]
    shape = (case.B, case.S, case.H * case.Dv)
    found = child.call(f"{JOBS}:flash", spec, amx_flash.tile_for(spec), inputs, shape, timeout_s=60)
    assert not isinstance(found, WorkerFailure), found
    got, counts = found
    wanted = reference(case, rounded(q), rounded(k * scale) / scale, rounded(v), mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2.0**-9 * np.abs(v).max())
    if counts:
        assert counts["tdpbf16ps"] > 0 and counts["ldtilecfg"] == counts["tilerelease"] > 0


def test_few_queries_are_left_to_vectors() -> None:
    rows = Operand.of((1, 1, 32), 1)
    spec = Attention(
        1, 1, 100, rows, replace(rows, shape=(1, 100, 32)), replace(rows, shape=(1, 100, 32)), (0,), (0,), (0,), 1.0
    )
    assert not amx_flash.serves(spec) and amx_flash.serves(replace(spec, S=16))
    assert amx_flash.tile_for(replace(spec, S=16)).rows == 16 and amx_flash.tile_for(replace(spec, S=17)).rows == 32
