from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rewriter.attention.lower import fragment, lower
from rewriter.attention.recognise import recognise
from rewriter.core.refusal import Refused
from rewriter.core.site import AttentionSite, Recognition, Site
from rewriter.graph.composites import COMPOSITE_DOMAIN
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Stepper
from tests.attention import exported

GRAPHS = {"bert": exported.bert, "gpt2": exported.gpt2, "llama": exported.llama, "vit": exported.vit, "t5": exported.t5}


def recognised(name: str) -> tuple[OnnxGraph, Recognition]:
    graph = GRAPHS[name]()
    return graph, exported.recognised(graph)


def feeds_of(graph: OnnxGraph, batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    feeds = {}
    for spec in graph.inputs:
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal((batch, *spec.shape[1:])).astype(np.float32)
        elif spec.name == "attention_mask":
            feeds[spec.name] = np.ones((batch, length), np.int64)
            feeds[spec.name][0, -3:] = 0
            feeds[spec.name][-1, :2] = 0
        else:
            feeds[spec.name] = rng.integers(3, 60, (batch, length))
    return feeds


def run(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    (output,) = Interpreter(graph, dtype=torch.float64).run(feeds).values()
    return output.numpy()


@pytest.mark.parametrize("name", GRAPHS)
def test_lowering_is_the_identity_at_sizes_never_seen(name: str) -> None:
    graph, found = recognised(name)
    lowered = lower(graph, found.sites)
    for batch, length in ((3, 14), (1, 5)):
        feeds = feeds_of(graph, batch, length)
        expected, actual = run(graph, feeds), run(lowered, feeds)
        # named activations equal the graph's float32 constants to 1e-7 only
        assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", GRAPHS)
def test_signature_stays_and_the_old_core_goes(name: str) -> None:
    graph, found = recognised(name)
    before = graph.fingerprint()
    lowered = lower(graph, found.sites)
    assert graph.fingerprint() == before
    assert (lowered.inputs, lowered.outputs) == (graph.inputs, graph.outputs)
    kinds = [node.op_type for node in lowered.topological() if not node.domain]
    assert "Softmax" not in kinds
    composites = [node.op_type for node in lowered.topological() if node.domain == COMPOSITE_DOMAIN]
    assert composites.count("Attention") == len(found.attention)
    for site in found.attention:
        for part in ("query", "key", "value", "features"):
            assert lowered.has(f"{site.id}/{part}")
    assert all(lowered.has(f"{block.id}/hidden") for block in found.feed_forward)


def test_the_same_site_gives_the_same_bytes() -> None:
    graph, found = recognised("llama")
    assert lower(graph, found.sites).fingerprint() == lower(graph, found.sites).fingerprint()
    again = recognise(graph)
    assert lower(graph, again.sites).fingerprint() == lower(graph, found.sites).fingerprint()


@pytest.mark.parametrize("name", GRAPHS)
def test_a_head_removed_equals_its_output_rows_zeroed(name: str) -> None:
    graph, found = recognised(name)
    site = found.attention[-1]
    assert site.output is not None
    weight = site.output.weight_HDC.copy()
    weight[1] = 0
    zeroed = replace(site, output=replace(site.output, weight_HDC=weight))
    feeds = feeds_of(graph, 3, 11)
    expected = run(lower(graph, [zeroed]), feeds)
    actual = run(lower(graph, [site.keep_heads((0, 2, 3))]), feeds)
    assert np.abs(actual - expected).max() <= 1e-9 * np.abs(expected).max()
    assert np.abs(run(graph, feeds) - expected).max() > 1e-6


def test_units_removed_equal_rows_zeroed() -> None:
    graph, found = recognised("llama")
    block = found.feed_forward[0]
    down = block.down_FC.copy()
    down[[3, 7]] = 0
    kept = tuple(unit for unit in range(block.width) if unit not in (3, 7))
    feeds = feeds_of(graph, 3, 11)
    expected = run(lower(graph, [replace(block, down_FC=down)]), feeds)
    assert np.abs(run(lower(graph, [block.keep_units(kept)]), feeds) - expected).max() <= 1e-9


def test_ranks_of_query_and_key_may_shrink() -> None:
    graph, found = recognised("bert")
    site = found.attention[0]
    assert site.query.weight_CGD is not None
    assert site.key.weight_CGD is not None
    small = replace(site, query=_cut(site, "query"), key=_cut(site, "key"))
    lowered = lower(graph, [small])
    assert lowered.constant("layers.0.attention/query.weight").shape == (24, 16)
    assert np.isfinite(run(lowered, feeds_of(graph, 2, 8))).all()


def _cut(site: AttentionSite, role: str) -> object:
    projection = getattr(site, role)
    return replace(projection, weight_CGD=projection.weight_CGD[..., :4], bias_GD=projection.bias_GD[..., :4])


def test_a_bias_keeps_the_heads_that_are_left() -> None:
    _, found = recognised("t5")
    site = found.attention[0]
    assert site.bias.heads_axis == 4
    assert site.keep_heads((1, 3)).bias.keep == (1, 3)
    assert site.keep_heads((1, 2, 3)).keep_heads((0, 2)).bias.keep == (1, 3)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_fragment_runs_on_a_stepper(name: str) -> None:
    graph, found = recognised(name)
    stepper = Stepper(graph, [feeds_of(graph, 2, 9)])
    for site in found.sites:
        part = fragment(graph, site)
        expected = stepper.value(part.outputs[0], 0)
        actual = stepper.run_fragment(part, 0)[part.outputs[0]]
        assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_site_without_output_is_refused() -> None:
    graph = exported.block()
    (site,) = recognise(graph).attention
    with pytest.raises(Refused, match="output"):
        lower(graph, [replace(site, output=None)])


def test_lowered_graphs_survive_saving(tmp_path) -> None:
    from rewriter.graph.onnx import load

    graph, found = recognised("bert")
    sites: tuple[Site, ...] = found.sites
    path = lower(graph, sites).save(tmp_path / "lowered.onnx")
    feeds = feeds_of(graph, 2, 8)
    assert np.abs(run(load(path), feeds) - run(graph, feeds)).max() < 1e-5
