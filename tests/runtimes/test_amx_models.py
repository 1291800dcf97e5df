"""Whole models on AMX: found out at run time, permission asked, built for elsewhere, refused where it is missing."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.core.errors import ModelError, OptionError
from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx as permission
from rewriter.runtimes.tvm import target as targets
from rewriter.runtimes.tvm import toolchain
from rewriter.runtimes.tvm.artifact import CODE, MANIFEST
from rewriter.runtimes.tvm.compile import build, lower
from rewriter.runtimes.tvm.embedded.library import write_library
from rewriter.runtimes.tvm.kernels.amx import required
from rewriter.runtimes.tvm.load import load
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure
from tests.runtimes import amx_emulator
from tests.runtimes.tvm.graphs import Encoder, feeds
from tests.runtimes.tvm.harness import needs, run_reference, target
from tests.runtimes.tvm.test_elsewhere import compiled_for, flat

JOBS = "tests.runtimes.amx_emulator.jobs"
SAPPHIRE = "llvm -mcpu=sapphirerapids"
FLAGS = ("amx_tile", "amx_bf16", "amx_int8")
PRODUCTS = {  # as bytes: VEX with map 0F38, any tiles
    "bf16": re.compile(rb"\xc4\xe2[\x42\x4a\x52\x5a\x62\x6a\x72\x7a]\x5c[\xc0-\xff]"),
    "int8": re.compile(rb"\xc4\xe2[\x41\x49\x51\x59\x61\x69\x71\x79]\x5e[\xc0-\xff]"),
}
GEMMS = 4  # of the encoder; query, key and value are one
BOUNDS = {"bf16": 1e-2, "int8": 3e-2}


@pytest.fixture(scope="module")
def child(amx: Path | None) -> Iterator[Worker]:
    with amx_emulator.worker(amx, threads=2) as made:
        yield made


def with_amx(threads: int = 1) -> Target:
    """This processor, if it also had AMX."""
    return replace(target(threads), features=tuple(dict.fromkeys((*target().features, *FLAGS))))


def sapphire() -> Target:
    return detect(SAPPHIRE, away=True)


def shapes(batch: int, tokens: int) -> list[dict[str, tuple[int, ...]]]:
    return [{"ids": (batch, tokens), "bias": (batch, 1, 1, tokens)}]


@needs("avx512_bf16")
@needs("avx512_vnni")
@pytest.mark.parametrize(("precision", "sizes", "batch", "tokens", "threads"), [
    ("int8", {}, 3, 5, 1), ("bf16", {"width": 96, "heads": 3, "hidden": 70}, 2, 40, 2),
])  # fmt: skip
def test_a_model_runs_on_tiles(
    child: Worker, tmp_path: Path, precision: str, sizes: dict[str, int], batch: int, tokens: int, threads: int
) -> None:
    graph, given = Encoder(precision=precision, **sizes).graph, feeds(batch, tokens)
    core = next(node for node in graph.model.graph if node.op_type == "Attention")
    core.attributes.add(ir.AttrString("precision", "bf16"))
    saved = graph.save(tmp_path / "model.onnx")
    found = child.call(f"{JOBS}:build_and_run", saved, given, tmp_path / "a", threads, timeout_s=120)
    assert not isinstance(found, WorkerFailure), found
    outputs, counts = found
    for name, reference in run_reference(graph, given).items():
        assert np.linalg.norm(outputs[name] - reference) < BOUNDS[precision] * np.linalg.norm(reference)
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert {"amx_tile", f"amx_{precision}"} <= set(manifest["requires"])
    assert any(name.startswith(f"gemm_amx_{precision}") for name in manifest["work"])
    assert any(name.startswith("flash_amx") for name in manifest["work"]) == (tokens > 16)
    if counts:
        assert counts["tdpbf16ps" if precision == "bf16" else "tdpb8"] > 0
        assert counts["ldtilecfg"] == counts["tilerelease"] >= GEMMS * threads
        assert (counts["tdpbf16ps"] > 0) == (precision == "bf16" or tokens > 16)


def test_tiles_are_compiled_for_where_they_are_not(tmp_path: Path) -> None:
    folder = build(Encoder(precision="bf16").graph, shapes(1, 8), tmp_path / "a", sapphire())
    assert PRODUCTS["bf16"].search((folder / CODE).read_bytes())
    assert {"amx_tile", "amx_bf16"} <= set(json.loads((folder / MANIFEST).read_text())["requires"])
    if not set(FLAGS) <= set(target().features):
        with pytest.raises(ModelError, match=r"needs a processor with .*amx_tile"):
            load(folder)


def test_an_exact_model_needs_no_tiles() -> None:
    assert not required(lower(Encoder().graph, shapes(1, 8), sapphire()).functions.functions.values())


def test_the_system_may_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has the flags, the kernel says no: artifacts are refused, targets do without."""
    if "avx512f" not in target().features:
        pytest.skip("this processor has no AVX-512")
    with_flags = tmp_path / "cpuinfo"
    with_flags.write_text(f"flags\t\t: {' '.join((*target().features, *FLAGS))}\n")
    monkeypatch.setattr(targets, "CPUINFO", with_flags)
    monkeypatch.setattr(permission, "permitted", lambda: True)
    assert detect("cpu").has_matrix_unit("bf16") and detect("cpu").has_matrix_unit("int8")
    assert not detect("cpu").has_matrix_unit("fp32")
    assert not replace(detect("cpu"), remote="127.0.0.1:1/key").has_matrix_unit("bf16")
    folder = build(Encoder(precision="int8").graph, shapes(1, 8), tmp_path / "a", detect("cpu"))
    assert PRODUCTS["int8"].search((folder / CODE).read_bytes())
    monkeypatch.setattr(permission, "permitted", lambda: False)
    assert not permission.among(detect("cpu").features) and not detect("cpu").has_matrix_unit("int8")
    with pytest.raises(ModelError, match="built for AMX, which this processor or its kernel does not permit"):
        load(folder)
    without = lower(Encoder(precision="int8").graph, shapes(1, 8), detect("cpu"))
    assert not required(without.functions.functions.values()) and any("int8" in name for name in without.work)


def test_naming_a_processor_with_tiles_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(flag for flag in target().features if not flag.startswith("amx"))
    monkeypatch.setattr(targets, "_flags", lambda: frozenset(without))
    with pytest.raises(OptionError, match=r"amx_tile.* which this processor lacks"):
        detect(SAPPHIRE)
    found = sapphire()
    assert found.elsewhere and found.arch == "x86_64" and set(FLAGS) <= set(found.features)


@needs("avx512_bf16")
def test_a_static_library_asks_for_itself(amx: Path | None, tmp_path: Path) -> None:
    graph, given = Encoder(precision="bf16").graph, feeds(2, 9)
    here = compiled_for(with_amx())
    write_library(graph, [{name: array.shape for name, array in given.items()}], tmp_path, here)
    link = [*toolchain.c_compiler(here), "-O1", "example.c", "libmodel.a", "-lm", "-o", "example"]
    toolchain.run(link, cwd=tmp_path)
    for name, array in given.items():
        np.ascontiguousarray(array).tofile(tmp_path / f"{name}.bin")
    words = ["./example", "model.weights.bin", *(f"{name}.bin" for name in given)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env=amx_emulator.environment(amx), check=True)
    wanted = flat(run_reference(graph, given))
    assert np.linalg.norm(np.frombuffer(done.stdout, np.float32) - wanted) < BOUNDS["bf16"] * np.linalg.norm(wanted)
    if amx is not None:
        refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and "built for AMX" in refused.stderr


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_peak_counts_its_products(child: Worker, precision: str) -> None:
    found = child.call(f"{JOBS}:peak", precision, timeout_s=60)
    assert not isinstance(found, WorkerFailure), found
    rate, counts, operations = found
    per_product = 2 * 16 * 16 * (32 if precision == "bf16" else 64)
    assert rate > 0 and operations == 3 * 4 * per_product
    assert not counts or counts["tdpbf16ps"] + counts["tdpb8"] == 2 * 3 * 4
