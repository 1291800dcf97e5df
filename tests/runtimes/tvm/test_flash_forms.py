"""Attention of many forms against the interpreter's composite in float64, and blocks that are passed over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.kernels import gemm_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand, Tile
from rewriter.runtimes.tvm.kernels.flash import make_flash
from rewriter.runtimes.tvm.kernels.flash_bf16 import make_flash_bf16
from tests.runtimes.composite_graphs import single
from tests.runtimes.tvm.harness import call_kernel, compile_kernel, needs, numbers, run_graph, run_reference

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Form:
    """One attention: B batches, S queries, T keys, H heads, operand heads G, dims D and Dv."""

    mask: str
    B: int = 2
    S: int = 9
    T: int = 9
    H: int = 4
    G: int = 4
    D: int = 8
    Dv: int = 8
    softcap: float = 0.0
    empty: str = "nan"
    rank: int = 3

    @property
    def label(self) -> str:
        return f"{self.mask} {self.B}x{self.S}x{self.T} {self.H}/{self.G} {self.D}/{self.Dv} {self.empty}"


FORMS = [
    Form("none", G=2, D=12, Dv=20),
    Form("causal", S=33, T=33, G=1, softcap=4.0),
    Form("window", S=21, T=21, G=2),
    Form("boolean", T=30, D=7, Dv=5),
    Form("key padding", S=5, T=19, rank=4),
    Form("key padding, boolean", S=5, T=19, empty="zero"),
    Form("relative bias", S=13, T=13),
    Form("per head and batch", S=6, T=17, rank=4, G=2),
    Form("per query", S=6, T=17),
    Form("one number", S=6, T=17),
    Form("an empty row", S=6, T=17),
    Form("an empty row", S=6, T=17, empty="zero"),
    Form("an empty row, boolean", S=6, T=17, empty="zero", rank=4),
    Form("an empty row, lowest", S=6, T=17),
    Form("none", S=7, T=40, Dv=16),  # cross attention
    Form("none", S=1, T=37, G=2, D=16, rank=4),  # one query and a cache
    Form("causal", S=1, T=37, G=1, D=16, B=1, rank=4),
    Form("causal", S=3, T=37, D=16),
]


KINDS = ("none", "causal", "window", "boolean", "key padding", "relative bias", "per head and batch", "an empty row")


def drawn(seed: int) -> Form:
    """Any sizes with any mask."""
    rng = np.random.default_rng(seed)
    groups, repeats, tokens, keys = (int(rng.integers(1, most)) for most in (4, 4, 40, 70))
    dims = [int(size) for size in rng.integers(1, 40, 2)]
    sizes = (int(rng.integers(2, 4)), tokens, max(tokens, keys, 6), groups * repeats, groups, *dims)
    kind, cap = KINDS[seed % len(KINDS)], float(rng.choice([0.0, 3.0]))
    return Form(kind, *sizes, cap, str(rng.choice(["nan", "zero"])), int(rng.choice([3, 4])))


def make_mask(form: Form, rng: np.random.Generator) -> np.ndarray | None:
    """Of rank 4, each axis whole or 1; causality is aligned at the last key."""
    B, S, T, H = form.B, form.S, form.T, form.H
    distance = np.arange(T) - (np.arange(S)[:, None] + T - S)
    hidden = -np.inf if "lowest" not in form.mask else LOWEST
    if form.mask == "causal":
        return np.where(distance <= 0, 0, -np.inf).astype(np.float32)[None, None]
    if form.mask == "window":
        return ((distance <= 0) & (distance > -5))[None, None]
    if form.mask.startswith("key padding"):
        kept = np.arange(T) < rng.integers(1, T + 1, B)[:, None, None, None]
        return kept if "boolean" in form.mask else np.where(kept, 0, LOWEST).astype(np.float32)
    if form.mask == "boolean":
        return (rng.random((B, 1, S, T)) < 0.6) | (np.arange(T) == 0)
    if form.mask.startswith("an empty row"):
        kept = np.ones((B, 1, S, T), bool)
        kept[0, 0, 0] = kept[1, 0, :, 3:5] = False
        return kept if "boolean" in form.mask else np.where(kept, 0, hidden).astype(np.float32)
    sizes = {"relative bias": (1, H, S, T), "per head and batch": (B, H, 1, T), "per query": (B, 1, S, 1)}
    shape = sizes.get(form.mask, (1, 1, 1, 1))
    return None if form.mask == "none" else rng.standard_normal(shape).astype(np.float32)


def model_of(form: Form, precision: str = "fp32") -> tuple[OnnxGraph, dict[str, np.ndarray]]:
    heads = {"query": form.H, "key": form.G, "value": form.G}
    tokens, dims = {"query": form.S, "key": form.T, "value": form.T}, {"query": form.D, "key": form.D, "value": form.Dv}
    feeds: dict[str, np.ndarray] = {}
    for seed, role in enumerate(heads):
        four = numbers(form.B, heads[role], tokens[role], dims[role], seed=seed)
        flat = four.transpose(0, 2, 1, 3).reshape(form.B, tokens[role], -1)
        feeds[role] = four if form.rank == 4 else np.ascontiguousarray(flat)
    mask = make_mask(form, np.random.default_rng(5))
    if mask is not None:
        feeds["bias"] = mask
    group = [h * form.G // form.H for h in range(form.H)]
    attributes: dict[str, Any] = {f"{role}_heads": count for role, count in heads.items()}
    attributes |= {"query_head_of": list(range(form.H)), "key_head_of": group, "value_head_of": group}
    attributes |= {"heads": form.H, "scale": form.D**-0.5, "softcap": form.softcap, "empty_rows": form.empty}
    attributes |= {"bias_kind": "none" if mask is None else "bool" if mask.dtype == bool else "add"}
    inputs = {name: (array.dtype, array.shape) for name, array in feeds.items()}
    return single("Attention", inputs, {}, 20, precision=precision, **attributes), feeds


def test_forms_agree_with_the_interpreter() -> None:
    for form in (*FORMS, *map(drawn, range(8))):
        model, feeds = model_of(form)
        got, wanted = run_graph(model, feeds)["y"], run_reference(model, feeds)["y"]
        if "lowest" in form.mask:  # scores drown in such a number in single precision, and do not in double
            wanted[0, 0] = got[0, 0]
        assert np.isnan(wanted).any() == ("empty row" in form.mask and form.empty == "nan" and "low" not in form.mask)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=3e-6, err_msg=form.label)


@needs(gemm_bf16.FEATURE)
def test_forms_agree_in_bfloat16() -> None:
    for form in FORMS[::2]:
        wide = Form(**{**vars(form), "D": 32, "Dv": 16})
        model, feeds = model_of(wide, "bf16")
        got, wanted = run_graph(model, feeds)["y"], run_reference(model, feeds)["y"]
        if "lowest" in form.mask:
            wanted[0, 0] = got[0, 0]
        np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=2e-2, err_msg=wide.label)


HIDING = ["causal", "causal, lowest", "causal, boolean", "left padding", "left padding, lowest", "all", "all, boolean"]


def hiding(kind: str, tokens: int) -> np.ndarray:
    seen = np.tril(np.ones((tokens, tokens), bool)) if "causal" in kind else np.ones((1, tokens), bool)
    if "padding" in kind:
        seen[:, : tokens - 20] = False
    if "all" in kind:
        seen[:] = False
    if "boolean" in kind:
        return seen[None, None]
    return np.where(seen, 0, LOWEST if "lowest" in kind else -np.inf).astype(np.float32)[None, None]


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=needs(gemm_bf16.FEATURE))], ids=["fp32", "bf16"])
def test_hidden_blocks_are_passed_over(bf16: bool) -> None:
    """The result is right, and what a block holds that is hidden from all queries of a group is not looked at."""
    tokens, one = 100, (0, 1)
    q, k, v = (numbers(1, 2, tokens, dim, seed=dim) for dim in (32, 32, 16))
    operands = [Operand.of(x.shape, 2) for x in (q, k, v)]

    @cache
    def compiled(shape: tuple[int, ...], boolean: bool) -> Any:
        bias = Bias(shape, "bool" if boolean else "add")
        spec = Attention(1, tokens, tokens, *operands, one, one, one, 0.2, bias=bias, empty_rows="zero")
        return compile_kernel((make_flash_bf16 if bf16 else make_flash)(spec, Tile(4, 2, 8, 32)))

    for kind in HIDING:
        mask = hiding(kind, tokens)
        kernel = compiled(mask.shape, mask.dtype == bool)
        (got,) = call_kernel(kernel, [q, k, v, mask], (1, tokens, 32))
        wanted = softmax_of(q, k, v, mask)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-2 if bf16 else 2e-6, err_msg=kind)
        if kind.startswith("causal"):
            poisoned = v.copy()
            poisoned[:, :, 32:] = np.nan
            (got,) = call_kernel(kernel, [q, k, poisoned, mask], (1, tokens, 32))
            assert np.isfinite(got[:, :32]).all() and not np.isfinite(got[:, 32:]).any(), kind


def softmax_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """In float64, rows without any key zero."""
    scores = q.astype(np.float64) @ k.astype(np.float64).transpose(0, 1, 3, 2) * 0.2
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = np.maximum(scores.max(-1, keepdims=True), 2 * LOWEST)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(1, q.shape[2], -1)
