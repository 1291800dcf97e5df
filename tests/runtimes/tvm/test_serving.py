"""Requests of all sizes on one artifact: filled up, cut back, refused or handed on beyond the largest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rewriter
from rewriter.core.errors import DataError, ModelError, OptionError
from rewriter.runtimes.standard import to_standard
from rewriter.runtimes.tvm import compile as compiling
from rewriter.runtimes.tvm.buckets import Buckets, TooLarge
from tests.runtimes.tvm.graphs import encoder, feeds
from tests.runtimes.tvm.harness import run_reference, target

SHAPES = [{"ids": (1, 4), "bias": (1, 1, 1, 4)}, {"ids": (2, 8), "bias": (2, 1, 1, 8)}]
PAD = {"ids": 0.0, "bias": float(np.finfo(np.float32).min)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = compiling.build(encoder(), SHAPES, tmp_path_factory.mktemp("serving") / "out", target(), pad=PAD)
    to_standard(encoder()).save(place / "model.onnx")
    return place


def test_requests_of_changing_sizes_do_not_see_each_other(folder: Path) -> None:
    model = rewriter.load(folder)
    # Long, then short in the same size: what the long one left behind must not be read.
    for batch, tokens in [(2, 8), (1, 5), (2, 7), (1, 4), (1, 1), (2, 8)]:
        given = feeds(batch, tokens)
        np.testing.assert_allclose(model(**given)["norm2"], run_reference(encoder(), given)["norm2"], atol=1e-5)


def test_results_stay_what_they_were(folder: Path) -> None:
    model = rewriter.load(folder)
    first = model(**feeds(1, 3))["norm2"]
    kept = first.copy()
    model(**feeds(1, 4))
    np.testing.assert_array_equal(first, kept)


def test_beyond_the_largest_onnxruntime_may_stand_in(folder: Path, tmp_path: Path) -> None:
    given = feeds(3, 9)
    with pytest.raises(DataError, match=r"the largest is ids 2x8.*--shape-histogram"):
        rewriter.load(folder)(**given)
    model = rewriter.load(folder, beyond="onnxruntime")
    for _ in range(2):
        np.testing.assert_allclose(model(**given)["norm2"], run_reference(encoder(), given)["norm2"], atol=1e-5)
    with pytest.raises(DataError, match="'bias' is missing"):
        model(ids=given["ids"])
    with pytest.raises(OptionError, match="'chunks' is unknown"):
        rewriter.load(folder, beyond="chunks")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"no model.onnx"):
        rewriter.load(tmp_path, beyond="onnxruntime")


def test_without_padding_only_the_sizes_built_run() -> None:
    spec = [{"name": "x", "dtype": "float32", "shape": [1, "tokens"]}]
    sizes = [{"function": f"f{n}", "inputs": {"x": [1, n]}} for n in (8, 4)]
    made = Buckets({"inputs": spec, "outputs": spec, "pad": {}, "buckets": sizes})
    assert made.fit({"x": np.zeros((1, 8))}).bucket["function"] == "f8"
    with pytest.raises(TooLarge, match="nothing is padded"):
        made.fit({"x": np.zeros((1, 3))})


def test_the_smallest_size_that_holds_it_is_taken_and_remembered() -> None:
    spec = [{"name": "x", "dtype": "float32", "shape": ["batch", "tokens"]}]
    sizes = [{"function": f"{b}x{n}", "inputs": {"x": [b, n]}} for b, n in [(1, 64), (4, 8)]]
    made = Buckets({"inputs": spec, "outputs": spec, "pad": {"x": 0.0}, "buckets": sizes})
    fit = made.fit({"x": np.zeros((1, 7))})
    assert fit.bucket["function"] == "4x8" and fit.crops == ((slice(0, 1), slice(0, 7)),)
    assert made.fit({"x": np.ones((1, 7))}) is fit
    assert made.fit({"x": np.zeros((1, 9))}).bucket["function"] == "1x64"
