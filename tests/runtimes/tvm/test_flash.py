"""The attention template against float64: odd sizes, grouped heads, hostile masks, both block regimes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rewriter.runtimes.tvm.kernels import gemm_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand, Tile
from rewriter.runtimes.tvm.kernels.flash import make_flash
from rewriter.runtimes.tvm.kernels.flash_bf16 import make_flash_bf16
from rewriter.runtimes.tvm.kernels.gemm_bf16 import rounded
from tests.runtimes.tvm.harness import needs, numbers, run_kernel

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Case:
    B: int
    S: int
    T: int
    H: int
    G: int
    D: int
    Dv: int
    mask: str = ""
    softcap: float = 0.0
    four: bool = False
    empty: str = "nan"
    heads: tuple[int, ...] = ()
    lanes: int = 16
    threads: int = 1
    tile: Tile = field(default_factory=Tile)

    @property
    def head_of(self) -> tuple[int, ...]:
        return self.heads or tuple(h * self.G // self.H for h in range(self.H))


CASES = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 32, 32, 2, 2, 16, 16, mask="causal"),
    Case(3, 9, 37, 4, 2, 20, 12, mask="holes and an empty row", softcap=5.0),
    Case(3, 9, 70, 4, 2, 20, 12, mask="holes and an empty row", empty="zero", tile=Tile(4, 2, 8, 32)),
    Case(2, 13, 50, 3, 3, 33, 40, mask="bool per head", four=True, tile=Tile(8, 3, 8, 48)),
    Case(1, 5, 100, 3, 2, 8, 70, mask="left padding, lowest float", heads=(1, 0, 1), tile=Tile(6, 2, 6, 32)),
    Case(1, 26, 26, 2, 1, 64, 64, mask="bool causal", tile=Tile(12, 2, 24, 64)),
    Case(2, 7, 19, 2, 2, 12, 9, mask="column", lanes=8, tile=Tile(4, 2, 4, 16)),
    Case(2, 7, 19, 2, 2, 12, 9, mask="all lowest", threads=2),
]


def make_mask(case: Case) -> np.ndarray | None:
    rng, zero = np.random.default_rng(3), np.zeros((case.B, 1, case.S, case.T), np.float32)
    causal = np.tril(np.ones((case.S, case.T), bool), case.T - case.S)[None, None]
    if case.mask == "causal":
        return np.where(causal, 0, -np.inf).astype(np.float32)
    if case.mask == "bool causal":
        return causal
    if case.mask == "holes and an empty row":
        zero[rng.random(zero.shape) < 0.5] = -np.inf
        zero[1, 0, 3] = -np.inf
        return zero
    if case.mask == "bool per head":
        return rng.random((1, case.H, 1, case.T)) < 0.6
    if case.mask == "left padding, lowest float":
        zero[..., : case.T - 20] = LOWEST
        return zero[:, :, :1]
    if case.mask == "column":
        return numbers(case.B, case.H, case.S, 1)
    if case.mask == "all lowest":
        return np.full((case.B, 1, 1, case.T), LOWEST, np.float32)
    return None


def reference(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """In float64, but with the mask added in float32 as every engine adds it."""
    picks = list(case.head_of)
    scores = q.astype(np.float64) @ k[:, picks].astype(np.float64).transpose(0, 1, 3, 2) * case.D**-0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else (scores.astype(np.float32) + mask)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    weights = np.nan_to_num(weights) if case.empty == "zero" else weights
    return (weights @ v[:, picks]).transpose(0, 2, 1, 3).reshape(case.B, case.S, -1)


def laid_out(case: Case, x: np.ndarray) -> np.ndarray:
    return x if case.four else np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.B}x{case.S}x{case.T} {case.mask}")
def test_matches_float64(case: Case, bf16: bool = False) -> None:
    q = numbers(case.B, case.H, case.S, case.D, seed=1)
    k, v = numbers(case.B, case.G, case.T, case.D, seed=2), numbers(case.B, case.G, case.T, case.Dv, seed=3)
    mask = make_mask(case)
    arrays = [laid_out(case, x) for x in (q, k, v)]
    operands = [Operand.of(array.shape, heads) for array, heads in zip(arrays, (case.H, case.G, case.G), strict=True)]
    bias = None if mask is None else Bias(mask.shape, "bool" if mask.dtype == bool else "add")
    spec = Attention(
        case.B, case.S, case.T, *operands, tuple(range(case.H)), case.head_of, case.head_of, case.D**-0.5,
        case.softcap, bias, case.empty, case.lanes, case.threads,
    )  # fmt: skip
    inputs = [*arrays, *([] if mask is None else [mask])]
    make = make_flash_bf16 if bf16 else make_flash
    (got,) = run_kernel(make(spec, case.tile), inputs, (case.B, case.S, case.H * case.Dv))
    if bf16:
        q, v = rounded(q), rounded(v)
        k = rounded(k * np.float32(case.D**-0.5)) / np.float32(case.D**-0.5)
    wanted = reference(case, q, k, v, mask)
    if "empty row" in case.mask:
        assert np.isnan(wanted).any() == (case.empty == "nan")
    # Probabilities are rounded before they are divided by their sum, so only their size is modelled here.
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2.0**-9 * np.abs(v).max() if bf16 else 2e-6)


@needs(gemm_bf16.FEATURE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.B}x{case.S}x{case.T} {case.mask}")
def test_bf16_rounds_operands_and_probabilities(case: Case) -> None:
    tile = replace(case.tile, vectors=2)
    wide = replace(case, D=-(-case.D // 32) * 32, Dv=-(-case.Dv // 16) * 16, lanes=16, tile=tile)
    test_matches_float64(wide, bf16=True)


def test_windows_of_one_packed_buffer() -> None:
    packed = numbers(2, 11, 3 * 16)
    operands = [Operand(packed.shape, 2, 8, 11 * 48, 48, 8, offset) for offset in (0, 16, 32)]
    spec = Attention(2, 11, 11, *operands, (0, 1), (0, 1), (0, 1), 8**-0.5)
    (got,) = run_kernel(make_flash(spec, Tile()), [packed] * 3, (2, 11, 16))
    q, k, v = (packed[..., at : at + 16].reshape(2, 11, 2, 8).transpose(0, 2, 1, 3) for at in (0, 16, 32))
    np.testing.assert_allclose(got, reference(Case(2, 11, 11, 2, 2, 8, 8), q, k, v, None), rtol=1e-5, atol=2e-6)
