"""Lowered, written out in standard operators and run by ONNX Runtime, a graph gives what it gave before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from models.export import run_plainly
from models.fixtures import read_pack
from rewriter.attention.feeds import usable_feeds
from rewriter.attention.lower import lower
from rewriter.attention.paths import Paths
from rewriter.attention.recognise import recognise
from rewriter.attention.trace import drawn
from rewriter.core.site import State
from rewriter.graph.onnx import load
from rewriter.runtimes.standard import to_standard

PACK = Path(__file__).parent.parent / "fixtures" / "l17.tar.xz"
NAMES = (
    "bert.sdpa",
    "bloom.eager",
    "conv1x1.eager",
    "gpt2_past.sdpa",
    "llama.sdpa",
    "qwen3.eager",
    "swin.eager",
    "t5.sdpa",
)


@pytest.fixture(scope="module")
def models() -> dict[str, onnx.ModelProto]:
    return dict(read_pack(PACK).models)


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_sees_no_difference_at_three_sizes(
    name: str, models: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(models[f"{name}.l17"], before)
    graph = load(before)
    sites = [site for site in recognise(graph).sites if site.state is State.LOWERABLE]
    assert sites
    to_standard(lower(graph, sites)).save(after)
    paths = Paths(graph)
    runs = usable_feeds(drawn(graph, paths), paths, None, seed=7)
    assert runs is not None
    for run in runs:
        for expected, actual in zip(run_plainly(before, run.feeds), run_plainly(after, run.feeds), strict=True):
            assert actual.shape == expected.shape
            assert np.array_equal(np.isnan(actual), np.isnan(expected))
            scale = max(float(np.abs(np.nan_to_num(expected)).max()), 1e-6)
            assert np.nan_to_num(np.abs(actual - expected)).max() <= 1e-5 * scale
