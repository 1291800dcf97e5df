"""Kernels are compiled once per content, whatever model, order or process asks for them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from rewriter.core.errors import OutputError
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm import compile as compiling
from rewriter.runtimes.tvm import objects
from rewriter.runtimes.tvm.artifact import MANIFEST, WEIGHTS
from rewriter.runtimes.tvm.load import load, read_weights
from rewriter.runtimes.tvm.objects import Objects, link
from tests.runtimes.tvm.graphs import Encoder, feeds
from tests.runtimes.tvm.harness import run_reference, target

FEEDS = feeds(1, 6)
SHAPES = [{name: array.shape for name, array in FEEDS.items()}]


def linked(graph: OnnxGraph, folder: Path) -> objects.Linked:
    return link(compiling.lower(graph, SHAPES, target()).functions, Objects(folder, target()))


def test_known_kernels_are_not_compiled_again(tmp_path: Path) -> None:
    first = linked(Encoder().graph, tmp_path)
    assert first.compiled == len(set(first.names.values())) == len(list(tmp_path.glob("*.o")))
    other_weights = linked(Encoder(seed=9).graph, tmp_path)
    assert other_weights.compiled == 0 and other_weights.names == first.names
    wider = linked(Encoder(hidden=56).graph, tmp_path)
    assert wider.compiled == 2  # the two products of the feed-forward; all else is known
    assert {*wider.names.values()} & {*first.names.values()}


def test_another_target_is_another_kernel(tmp_path: Path) -> None:
    function = next(iter(compiling.lower(Encoder().graph, SHAPES, target()).functions.functions.values()))
    assert Objects(tmp_path, target()).symbol("a_0", function) == Objects(tmp_path, target()).symbol("a_7", function)
    assert Objects(tmp_path, target()).symbol("a", function) != Objects(tmp_path, target(2)).symbol("a", function)


def test_a_model_of_known_kernels_computes_what_it_should(tmp_path: Path) -> None:
    compiling.build(Encoder().graph, SHAPES, tmp_path / "first", target(), tmp_path / "cache")
    before = sorted((tmp_path / "cache").iterdir())
    graph = Encoder(seed=4).graph
    artifact = compiling.build(graph, SHAPES, tmp_path / "second", target(), tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == before
    found, wanted = load(artifact).run(FEEDS), run_reference(graph, FEEDS)
    for name, reference in wanted.items():
        np.testing.assert_allclose(found[name], reference, rtol=1e-4, atol=1e-4)
    work = json.loads((artifact / MANIFEST).read_text())["work"]
    assert any(name.startswith("gemm_fp32_") for name in work) and any(name.startswith("flash_") for name in work)


def test_an_artifact_holds_what_it_reads_and_no_more(tmp_path: Path) -> None:
    artifact = compiling.build(Encoder().graph, SHAPES, tmp_path / "a", target())
    used = json.loads((artifact / MANIFEST).read_text())["buckets"][0]["parameters"]
    assert set(read_weights(artifact / WEIGHTS)) == set(used)


def test_an_object_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="No space left"):
            compiling.build(Encoder().graph, SHAPES, tmp_path / "a", target(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "a").exists()
    assert linked(Encoder().graph, tmp_path / "cache").compiled > 0


def test_a_linker_without_room_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link_nothing(output: str, objects: list[str], **_: object) -> None:
        raise RuntimeError("Compilation error:\nld: final link failed: No space left on device, an error\nCommand: cc")

    monkeypatch.setattr(compiling, "linker", lambda _: link_nothing)
    link_nothing.get_target_triple = lambda: "x86_64-linux-gnu"  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="No space left"):
        compiling.build(Encoder().graph, SHAPES, tmp_path / "a", target(), tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
