"""Code for other processors: compiled here, its numbers checked under emulation where that is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rewriter.core.errors import ModelError, OptionError
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm import toolchain
from rewriter.runtimes.tvm.artifact import MANIFEST, read_manifest
from rewriter.runtimes.tvm.compile import build
from rewriter.runtimes.tvm.embedded.library import write_library
from rewriter.runtimes.tvm.target import detect
from tests.runtimes.tvm import graphs
from tests.runtimes.tvm.harness import run_reference

AARCH64 = ("llvm -mtriple=aarch64-linux-gnu -mattr=+neon", "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72")
ELF_AARCH64 = 183
ELF_CUDA = 190
LOOSE = {"fp32": 1e-5, "bf16": 0.1, "int8": 0.1}


def cross() -> Target:
    """The AArch64 target; skips, visibly, where no compiler for it is installed."""
    return compiled_for(detect(AARCH64[0], away=True))


def compiled_for(target: Target) -> Target:
    """The target; skips, visibly, where no C compiler for it is installed."""
    try:
        toolchain.c_compiler(target)
    except OptionError as problem:
        pytest.skip(str(problem))
    return target


def run_library(
    graph: OnnxGraph, feeds: Mapping[str, np.ndarray], folder: Path, target: Target, emulator: tuple[str, ...] = ()
) -> np.ndarray:
    """The example program that comes with a static library, on these inputs; all outputs as one row of numbers."""
    write_library(graph, [{name: array.shape for name, array in feeds.items()}], folder, target)
    link = [*toolchain.c_compiler(target), "-O1", "-Wall", "-Werror", "-static", "example.c", "libmodel.a", "-lm"]
    toolchain.run([*link, "-o", "example"], cwd=folder)
    names = [spec.name for spec in graph.inputs]
    for name in names:
        np.ascontiguousarray(feeds[name]).tofile(folder / f"{name}.bin")
    words = [*emulator, "./example", "model.weights.bin", *(f"{name}.bin" for name in names)]
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=120, check=True)
    return np.frombuffer(done.stdout, np.float32)


def flat(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in outputs.values()])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sizes", [{}, {"width": 24, "heads": 3, "hidden": 17}])
def test_neon_computes_the_same(tmp_path: Path, precision: str, sizes: dict[str, int]) -> None:
    """Formats without instructions are rounded as they say and multiplied in fp32."""
    target, emulator = cross(), shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    graph, feeds = graphs.Encoder(precision=precision, **sizes).graph, graphs.feeds(2, 9, valid=7)
    got, wanted = run_library(graph, feeds, tmp_path, target, (emulator,)), flat(run_reference(graph, feeds))
    np.testing.assert_allclose(got, wanted, rtol=LOOSE[precision], atol=LOOSE[precision])


@pytest.mark.parametrize("text", AARCH64)
def test_an_artifact_for_another_processor_is_written_and_not_loaded(tmp_path: Path, text: str) -> None:
    cross()
    folder = build(graphs.encoder(), [{"ids": (1, 8), "bias": (1, 1, 1, 8)}], tmp_path / "a", detect(text, away=True))
    assert int.from_bytes((folder / "model.so").read_bytes()[18:20], "little") == ELF_AARCH64
    assert json.loads((folder / MANIFEST).read_text())["requires"] == ["asimd"]
    with pytest.raises(ModelError, match="compiled for aarch64, this machine is"):
        read_manifest(folder)


def test_a_gpu_artifact_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    compiled_for(detect("cpu"))  # nvcc calls it
    target = detect("cuda -arch=sm_90", away=True)
    folder = build(graphs.encoder(), [{"ids": (1, 8), "bias": (1, 1, 1, 8)}], tmp_path / "a", target)
    cubin = (folder / "model.cubin").read_bytes()
    assert int.from_bytes(cubin[18:20], "little") == ELF_CUDA and b"matmul" in cubin
    with pytest.raises(ModelError, match="compiled for cuda"):
        read_manifest(folder)


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda _: None)
    monkeypatch.setattr(toolchain, "find_spec", lambda _: None)
    shapes = [{"ids": (1, 8), "bias": (1, 1, 1, 8)}]
    with pytest.raises(OptionError, match="gcc-aarch64-linux-gnu"):
        build(graphs.encoder(), shapes, tmp_path / "a", detect(AARCH64[0], away=True))
    with pytest.raises(OptionError, match="cuda-bindings"):
        build(graphs.encoder(), shapes, tmp_path / "b", detect("cuda -arch=sm_90", away=True))
    assert not list(tmp_path.iterdir())


def test_a_static_library_runs_here(tmp_path: Path) -> None:
    target, graph, feeds = compiled_for(detect("cpu")), graphs.encoder(), graphs.feeds(1, 7)
    got = run_library(graph, feeds, tmp_path, target)
    np.testing.assert_allclose(got, flat(run_reference(graph, feeds)), rtol=1e-5, atol=1e-5)
    assert len((tmp_path / "example.c").read_text().splitlines()) <= 35


def test_a_static_library_is_for_one_thread_of_a_processor(tmp_path: Path) -> None:
    for target in (detect("cpu", 2), detect("cuda -arch=sm_90", away=True)):
        with pytest.raises(OptionError, match="one thread"):
            write_library(graphs.encoder(), [{"ids": (1, 8), "bias": (1, 1, 1, 8)}], tmp_path / "a", target)
