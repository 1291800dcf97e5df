"""A whole tiny encoder: exact against float64, fused as intended, and its artifact in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm

from rewriter.core.errors import DataError, ModelError, OptionError, OutputError
from rewriter.runtimes.base import Executable, Runtime
from rewriter.runtimes.tvm import compile as compiling
from rewriter.runtimes.tvm.artifact import CODE, MANIFEST, WEIGHTS
from rewriter.runtimes.tvm.fusion import fuse
from rewriter.runtimes.tvm.load import load
from rewriter.runtimes.tvm.profile import profile
from rewriter.runtimes.tvm.runtime import TvmRuntime
from rewriter.runtimes.tvm.specialise import specialise
from tests.runtimes.tvm.graphs import encoder, feeds
from tests.runtimes.tvm.harness import assert_same, run_reference, target

SHAPES = [{"ids": (1, 8), "bias": (1, 1, 1, 8)}, {"ids": (2, 16), "bias": (2, 1, 1, 16)}]
PAD = {"ids": 0.0, "bias": float(np.finfo(np.float32).min)}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return compiling.build(encoder(), SHAPES, folder / "tvm", target(), cache=folder / "cache", pad=PAD)


@pytest.mark.parametrize(("batch", "tokens", "threads"), [(1, 11, 1), (3, 7, 2)])
def test_encoder_matches_float64(batch: int, tokens: int, threads: int) -> None:
    assert_same(encoder(), feeds(batch, tokens, tokens - 3), 1e-5, threads)


def test_fusion_leaves_one_node_per_template() -> None:
    program = specialise(encoder(), {name: array.shape for name, array in feeds().items()})
    fuse(program)
    kinds = [node.key for node in program.nodes]
    linear, norm = "rewriter:Linear", "rewriter:Norm"
    assert kinds == ["Gather", linear, "rewriter:Attention", linear, norm, linear, linear, norm]
    assert [node.input(3) != "" for node in program.nodes if node.key == linear] == [False, True, False, True]


def test_runtime_is_what_the_others_are(tmp_path: Path) -> None:
    runtime = TvmRuntime()
    assert isinstance(runtime, Runtime) and runtime.available() is None
    given = feeds(1, 5)
    place = runtime.build(encoder(), {name: array.shape for name, array in given.items()}, tmp_path, target())
    executable = runtime.load(place, 1)
    assert isinstance(executable, Executable)
    executable.bind(given)()
    np.testing.assert_allclose(executable.run(given)["norm2"], run_reference(encoder(), given)["norm2"], atol=1e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (1, 5), (2, 16), (2, 9), (1, 12)])
def test_buckets_pad_and_crop(artifact: Path, batch: int, tokens: int) -> None:
    given = feeds(batch, tokens)
    got, wanted = load(artifact).run(given)["norm2"], run_reference(encoder(), given)["norm2"]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_beyond_the_largest_bucket_is_said(artifact: Path) -> None:
    with pytest.raises(DataError, match="the largest is ids 2x16"):
        load(artifact).run(feeds(2, 17))
    with pytest.raises(DataError, match="'bias' is missing"):
        load(artifact).run({"ids": feeds()["ids"]})
    with pytest.raises(DataError, match="no input 'x'"):
        load(artifact).run({"x": feeds()["ids"]})


def test_many_threads_get_their_own_results(artifact: Path) -> None:
    executable = load(artifact)
    inputs = [feeds(1, 5 + index % 4) for index in range(8)]
    alone = [executable.run(given)["norm2"] for given in inputs]
    together: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        for _ in range(5):
            together[index] = executable.run(inputs[index])["norm2"]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, wanted in enumerate(alone):
        np.testing.assert_array_equal(together[index], wanted)


def test_another_process_runs_it_without_the_optimizer(artifact: Path) -> None:
    given = feeds(1, 8)
    np.savez(artifact.parent / "feeds.npz", **given)
    script = (
        "import sys, numpy as np; from rewriter.runtimes.tvm.load import load; "
        f"out = load({str(artifact)!r}).run(dict(np.load({str(artifact.parent / 'feeds.npz')!r}))); "
        f"np.savez({str(artifact.parent / 'out.npz')!r}, **out); "
        "assert not {'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'rewriter.graph'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(artifact.parent / "out.npz") as out:
        np.testing.assert_array_equal(out["norm2"], load(artifact).run(given)["norm2"])


def test_other_weights_compile_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(tvm, "compile", refuse)
    other = encoder(seed=7)
    place = compiling.build(other, SHAPES, tmp_path / "tvm", target(), cache=artifact.parent / "cache", pad=PAD)
    given = feeds(1, 8)
    np.testing.assert_allclose(load(place).run(given)["norm2"], run_reference(other, given)["norm2"], atol=1e-5)


def test_buckets_share_packed_weights(artifact: Path) -> None:
    first, second = json.loads((artifact / MANIFEST).read_text())["buckets"]
    assert set(first["parameters"]) == set(second["parameters"])


@pytest.mark.parametrize(("change", "message"), [
    ({"requires": ["avx1024"]}, "needs a processor with avx1024"),
    ({"versions": {"apache-tvm": "0.1"}}, "was built with"),
    ({"format": 99}, "has format 99"),
    ({"sha256": {CODE: "0", WEIGHTS: "0"}}, "its hash differs"),
])  # fmt: skip
def test_an_artifact_that_does_not_fit_is_refused(
    artifact: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for name in (CODE, WEIGHTS):
        (tmp_path / name).symlink_to(artifact / name)
    (tmp_path / MANIFEST).write_text(json.dumps({**json.loads((artifact / MANIFEST).read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_altered_code_is_never_loaded(artifact: Path, tmp_path: Path) -> None:
    for name in (CODE, WEIGHTS, MANIFEST):
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    (tmp_path / CODE).write_bytes((artifact / CODE).read_bytes() + b"x")
    with pytest.raises(ModelError, match="hash differs"):
        load(tmp_path)
    (tmp_path / CODE).unlink()
    with pytest.raises(ModelError, match="is missing"):
        load(tmp_path)
    with pytest.raises(ModelError, match="built for 1 threads"):
        load(artifact, threads=2)


def test_bad_shapes_and_places_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no fixed shape"):
        specialise(encoder(), {})
    with pytest.raises(OptionError, match="does not fit input bias"):
        specialise(encoder(), {"ids": (1, 4), "bias": (1, 1, 2, 4)})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        compiling.build(encoder(), SHAPES[:1], tmp_path / "file" / "tvm", target())


def test_profile_names_the_kernels(artifact: Path) -> None:
    seconds = profile(load(artifact), feeds(1, 8), runs=3)
    assert any(name.startswith("gemm") for name in seconds) and any(name.startswith("flash") for name in seconds)
    assert all(value >= 0 for value in seconds.values())
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)


def test_serialising_code_does_not_end_the_process() -> None:
    """With apache-tvm-ffi 0.1.15 this crashes, with no traceback: in a child, so that the crash is a failed test."""
    script = (
        "import tvm; from rewriter.runtimes.tvm.kernels.norm import Norm, make_norm; "
        "module = tvm.IRModule({'norm': make_norm(Norm((2, 8), 1e-5))}); "
        "assert 'norm' in str(tvm.ir.load_json(tvm.ir.save_json(module)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
