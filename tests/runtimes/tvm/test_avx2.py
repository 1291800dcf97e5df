"""With ``-mcpu=haswell`` everything runs on AVX2 alone, whatever more the processor has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm

from rewriter.core.errors import ModelError
from rewriter.core.target import Target
from rewriter.runtimes.tvm import target as targets
from rewriter.runtimes.tvm.compile import build, lower
from rewriter.runtimes.tvm.load import load
from rewriter.runtimes.tvm.target import detect, tvm_target
from tests.runtimes.tvm import graphs, harness

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is an instruction set of x86-64")


@cache
def haswell(threads: int = 1) -> Target:
    return detect("llvm -mcpu=haswell", threads)


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in detect("cpu").features:
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(harness, "target", haswell)


@pytest.mark.parametrize("sizes", [{}, {"width": 24, "heads": 3, "hidden": 17}, {"width": 64, "heads": 4}])
@pytest.mark.parametrize(("batch", "tokens", "threads"), [(1, 1, 1), (2, 13, 1), (1, 40, 2)])
def test_a_model_is_exact(sizes: dict[str, int], batch: int, tokens: int, threads: int) -> None:
    feeds = graphs.feeds(batch, tokens, valid=max(1, tokens - 2))
    harness.assert_same(graphs.Encoder(**sizes).graph, feeds, threads=threads)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_formats_without_instructions_fall_back(precision: str) -> None:
    """Rounded as the format says, multiplied in fp32: the same as where the instructions are, but for summation."""
    graph, feeds = graphs.Encoder(precision=precision).graph, graphs.feeds(2, 9)
    got, wanted = harness.run_graph(graph, feeds), harness.run_reference(graph, feeds)
    exact = harness.run_reference(graphs.Encoder().graph, feeds)
    for name, reference in wanted.items():
        assert np.abs(got[name] - reference).max() <= 2 * np.abs(exact[name] - reference).max() + 1e-4


def test_no_newer_instruction_is_emitted() -> None:
    module = lower(graphs.Encoder(precision="int8").graph, [{"ids": (2, 9), "bias": (2, 1, 1, 9)}], haswell())
    compiled = tvm.compile(module.functions, target=tvm_target(haswell()))
    text = "".join(part.inspect_source("asm") for part in _parts(compiled.mod) if part.kind == "llvm")
    assert "ymm" in text and "vfmadd" in text and "zmm" not in text and "tdpbf16ps" not in text


def _parts(module: object) -> list[object]:
    return [module, *(part for child in module.imports for part in _parts(child))]  # type: ignore[attr-defined]


def test_an_artifact_names_what_it_needs_and_is_refused_where_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = graphs.feeds(1, 6)
    folder = build(graphs.encoder(), [{name: a.shape for name, a in feeds.items()}], tmp_path / "a", haswell())
    assert load(folder).manifest["requires"] == ["avx2", "fma"]
    monkeypatch.setattr(targets, "_flags", lambda: frozenset({"sse2", "fma"}))
    with pytest.raises(ModelError, match="needs a processor with avx2"):
        load(folder)
