"""The state table over float16 and bfloat16: modules turned before export, and graphs turned by a converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from models.export import run_plainly
from models.families import FAMILIES
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import load
from rewriter.runtimes.standard import to_standard
from tests.attention.states import check_state, found_in, pack

CELLS = dict(pack("half").models)
RUN = (
    "bert.sdpa.l17c",
    "llama.sdpa.l17h",
    "gpt2_past.eager.l17k",
    "llama.sdpa.l17c",
    "t5.eager.l17k",
    "vit.eager.l17h",
)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_has_its_state(cell: str, tmp_path: Path) -> None:
    check_state(cell, found_in(CELLS[cell], tmp_path))


@pytest.mark.parametrize("cell", RUN)
def test_the_runtime_computes_the_same(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(CELLS[cell], path)
    graph = load(path)
    found = recognise(graph)
    sites = [site for site in (*found.attention, *found.feed_forward) if site.state is State.LOWERABLE]
    lowered = to_standard(lower(graph, sites)).save(tmp_path / "lowered.onnx")
    name, form, _ = cell.split(".")
    example = FAMILIES[name].build("sdpa" if form == "sdpa" else "eager")
    dtypes = {spec.name: spec.dtype for spec in graph.inputs}
    given = zip(example.names, example.inputs, strict=True)
    feeds = {key: tensor.numpy().astype(dtypes[key]) for key, tensor in given if key in dtypes}
    for expected, actual in zip(run_plainly(path, feeds), run_plainly(lowered, feeds), strict=True):
        assert actual.dtype == expected.dtype
        wide = expected.astype(np.float64)
        assert np.abs(actual - wide).max() <= 1e-2 * np.abs(wide).max()
