"""Norms with residual sums over odd widths, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.runtimes.tvm.kernels.gather import Gather, make_gather
from rewriter.runtimes.tvm.kernels.norm import Norm, make_norm
from tests.runtimes.tvm.harness import numbers, run_kernel

CASES = [
    Norm((1, 4, 384), 1e-12),
    Norm((2, 5, 37), 1e-5, residual=True, keep_sum=True),
    Norm((3, 7), 1e-6, "rms", bias=False),
    Norm((2, 3, 50), 1e-6, "rms", residual=True),
    Norm((1, 1), 1e-5),
    Norm((6, 20), 1e-5, lanes=8, threads=2),
]


@pytest.mark.parametrize("norm", CASES, ids=str)
def test_matches_float64(norm: Norm) -> None:
    x, residual = numbers(*norm.shape, seed=1) * 3 + 10, numbers(*norm.shape, seed=2)
    gain, bias = numbers(norm.shape[-1], seed=3), numbers(norm.shape[-1], seed=4)
    inputs = [x, *([residual] if norm.residual else []), gain, *([bias] if norm.bias else [])]
    got, *sums = run_kernel(make_norm(norm), inputs, *[norm.shape] * (2 if norm.keep_sum else 1))
    total = x.astype(np.float64) + (residual if norm.residual else 0.0)
    centred = total - total.mean(-1, keepdims=True) if norm.kind == "layer" else total
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon) * gain
    np.testing.assert_allclose(got, wanted + (bias if norm.bias else 0.0), rtol=1e-5, atol=1e-5)
    for array in sums:
        np.testing.assert_allclose(array, total, rtol=1e-6)


def test_gather_counts_negative_indices_from_the_end_and_never_leaves_the_table() -> None:
    table, indices = numbers(5, 19), np.array([[0, -1, 4], [-5, 99, -99]], np.int64)
    (got,) = run_kernel(make_gather(Gather(5, 19, (2, 3))), [table, indices], (2, 3, 19))
    np.testing.assert_array_equal(got, table[np.array([[0, 4, 4], [0, 4, 0]])])
