"""Any attention, by any of the kernels, with hostile masks: what float64 says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.runtimes.tvm.kernels import decode, flash, flash_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand, Tile
from rewriter.runtimes.tvm.kernels.gemm_bf16 import FEATURE, rounded
from rewriter.runtimes.tvm.target import tvm_target
from tests.runtimes.tvm import harness
from tests.runtimes.tvm.harness import numbers
from tests.runtimes.tvm.test_avx2 import haswell

LOWEST = float(np.finfo(np.float32).min)
HIDDEN = (-np.inf, LOWEST, -1e30, -1e9, -1e4)
MASKS = ("none", "causal", "window", "holes", "key padding", "left padding", "no key for some", "no key at all", "bool")


@dataclass(frozen=True)
class Drawn:
    """One attention: B batches, G groups of R heads, S queries, T keys; which of B and H the mask has axes for."""

    kernel: str
    B: int
    G: int
    R: int
    S: int
    T: int
    D: int
    Dv: int
    mask: str
    hidden: float
    axes: tuple[bool, bool]
    softcap: float
    kept: bool
    sink: bool
    empty: str
    four: bool
    lanes: int
    threads: int
    tile: Tile
    seed: int


@st.composite
def attentions(draw: st.DrawFn, kernel: str) -> Drawn:
    lanes = 16 if kernel == "bf16" or ("avx512f" in harness.target().features and draw(st.booleans())) else 8
    dims = st.integers(1, 3).map(lambda n: n * lanes * (2 if kernel == "decode bf16" else 1))
    dims = dims if kernel.startswith("decode") else st.integers(1, 50)
    rows = draw(st.integers(1, 12))
    tile = Tile(rows, 2, rows * draw(st.integers(1, 3)), draw(st.sampled_from([16, 32, 64, 96, 256])))
    few = kernel.startswith("decode")
    return Drawn(
        kernel, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
        draw(st.integers(1, 5 if few else 40)), draw(st.integers(1, 600 if few else 110)), draw(dims), draw(dims),
        draw(st.sampled_from(MASKS)), draw(st.sampled_from(HIDDEN)), (draw(st.booleans()), draw(st.booleans())),
        draw(st.sampled_from([0.0, 4.0])), draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from(["nan", "zero"])), draw(st.booleans()), lanes, draw(st.integers(1, 2)), tile,
        draw(st.integers(0, 99)),
    )  # fmt: skip


def seen_by(drawn: Drawn, rng: np.random.Generator) -> np.ndarray:
    """(B or 1, H or 1, S or 1, T), True where a query sees a key."""
    S, T = drawn.S, drawn.T
    lead = (drawn.B if drawn.axes[0] else 1, drawn.G * drawn.R if drawn.axes[1] else 1)
    distance = np.arange(T) - (np.arange(S)[:, None] + T - S)
    if drawn.mask == "causal":
        return np.broadcast_to(distance <= 0, (*lead, S, T)).copy()
    if drawn.mask == "window":
        return np.broadcast_to((distance <= 2) & (distance > -6), (*lead, S, T)).copy()
    if drawn.mask.endswith("padding"):
        lengths = rng.integers(1, T + 1, lead)[..., None, None]
        return np.arange(T) < lengths if drawn.mask == "key padding" else np.arange(T) >= T - lengths
    seen = rng.random((*lead, S, T)) < 0.5
    seen[..., 0] = True
    if drawn.mask == "no key for some":
        seen[rng.random((*lead, S)) < 0.4] = False
    return np.zeros_like(seen) if drawn.mask == "no key at all" else seen


def mask_of(drawn: Drawn, rng: np.random.Generator) -> np.ndarray | None:
    if drawn.mask == "none":
        return None
    seen = seen_by(drawn, rng)
    if drawn.mask == "bool":
        return seen
    relative = rng.standard_normal(seen.shape) if drawn.axes[1] else np.zeros(seen.shape)
    return np.where(seen, relative, drawn.hidden).astype(np.float32)


def expected(drawn: Drawn, q: np.ndarray, k: np.ndarray, v: np.ndarray, rest: dict[str, np.ndarray]) -> np.ndarray:
    """In float64, but with the mask added in float32 as every engine adds it."""
    heads = [h // drawn.R for h in range(drawn.G * drawn.R)]
    scores = q.astype(np.float64) @ k[:, heads].astype(np.float64).transpose(0, 1, 3, 2)
    if drawn.softcap:
        scores = drawn.softcap * np.tanh(scores / drawn.softcap)
    if "kept" in rest:
        scores = np.where(rest["kept"], scores, 0.0)
    if "bias" in rest:
        bias = rest["bias"]
        scores = np.where(bias, scores, -np.inf) if bias.dtype == bool else scores.astype(np.float32) + bias
    if "sink" in rest:
        column = np.broadcast_to(rest["sink"][None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], -1)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., : drawn.T]
    weights = np.nan_to_num(weights) if drawn.empty == "zero" else weights
    return (weights @ v[:, heads]).transpose(0, 2, 1, 3).reshape(drawn.B, drawn.S, -1)


def laid_out(x: np.ndarray, four: bool) -> np.ndarray:
    return x if four else np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1)


def check(drawn: Drawn) -> None:
    """Compile, run, compare."""
    rng, H = np.random.default_rng(drawn.seed), drawn.G * drawn.R
    q, k = numbers(drawn.B, H, drawn.S, drawn.D, seed=1), numbers(drawn.B, drawn.G, drawn.T, drawn.D, seed=2)
    v, scale = numbers(drawn.B, drawn.G, drawn.T, drawn.Dv, seed=3), np.float32(drawn.D**-0.5)
    narrow: Any = "bfloat16" if drawn.kernel == "decode bf16" else "float32"
    mask, rest = mask_of(drawn, rng), {}
    if mask is not None:
        rest["bias"] = mask
    if drawn.kept:
        rest["kept"] = rng.random((1, 1, drawn.S, drawn.T)) < 0.8
    if drawn.sink:
        rest["sink"] = np.where(rng.random(H) < 0.2, -np.inf, rng.standard_normal(H)).astype(np.float32)
    arrays = [laid_out(x, drawn.four) for x in (q, k, v)]
    operands = [
        Operand.of(x.shape, n, kind)
        for x, n, kind in zip(arrays, (H, drawn.G, drawn.G), ("float32", narrow, narrow), strict=True)
    ]
    groups = tuple(h // drawn.R for h in range(H))
    bias, kept = (
        Bias(rest[n].shape, "bool" if rest[n].dtype == bool else "add") if n in rest else None for n in ("bias", "kept")
    )
    spec = Attention(
        drawn.B, drawn.S, drawn.T, *operands, tuple(range(H)), groups, groups, drawn.D**-0.5, drawn.softcap, bias,
        drawn.empty, drawn.lanes, drawn.threads, kept, drawn.sink,
    )  # fmt: skip
    make: Any = {"flash": flash.make_flash, "bf16": flash_bf16.make_flash_bf16}.get(drawn.kernel, decode.make_decode)
    on = haswell() if drawn.lanes == 8 else harness.target()
    module = tvm.IRModule({"kernel": make(spec, drawn.tile).with_attr("global_symbol", "kernel")})
    given_arrays = [arrays[0], *(x.astype(narrow) if narrow == "float32" else as_bfloat16(x) for x in arrays[1:])]
    compiled = tvm.compile(module, target=tvm_target(on))["kernel"]
    (got,) = harness.call_kernel(compiled, [*given_arrays, *rest.values()], (drawn.B, drawn.S, H * drawn.Dv))
    k, tolerance = k * scale, 3e-6
    if drawn.kernel == "bf16":
        q, k, v, tolerance = rounded(q), rounded(k), rounded(v), 2.0**-8 * float(np.abs(v).max())
    elif drawn.kernel == "decode bf16":
        k, v = rounded(k / scale) * scale, rounded(v)
    np.testing.assert_allclose(got, expected(drawn, q, k, v, rest), rtol=1e-5, atol=tolerance, err_msg=str(drawn))


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16)


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@examples(8)
@given(attentions("flash"))
def test_flash(drawn: Drawn) -> None:
    check(drawn)


@harness.needs(FEATURE)
@examples(8)
@given(attentions("bf16"))
def test_flash_bf16(drawn: Drawn) -> None:
    check(drawn)


@examples(8)
@given(attentions("decode"))
def test_decode(drawn: Drawn) -> None:
    check(drawn)


@examples(6)
@given(attentions("decode bf16"))
def test_decode_of_a_bfloat16_cache(drawn: Drawn) -> None:
    check(drawn)
