"""Drawn weights in place of large ones: the same sites, with the model's own numbers, and none of them read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rewriter.attention import weights
from rewriter.attention.paths import Paths
from rewriter.attention.recipes import pick
from rewriter.attention.recognise import recognise
from rewriter.benchmark.decoder import Sizes, write_decoder
from rewriter.core.site import AttentionSite, FeedForwardSite, State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import load
from rewriter.graph.operators.linear import hankel, product
from tests.attention import exported


@pytest.mark.parametrize("steps", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("shape", [(70, 90), (300, 40)])
def test_a_hankel_matrix_multiplies_as_any_matrix(shape: tuple[int, int], steps: tuple[int, int]) -> None:
    length = steps[0] * (shape[0] - 1) + steps[1] * (shape[1] - 1) + 1
    line = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = line.as_strided(shape, steps)
    x = torch.randn(2, 5, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert hankel(matrix) and not hankel(matrix.contiguous())
    assert torch.allclose(product(x, matrix), x @ matrix.contiguous(), rtol=0, atol=1e-12)
    assert torch.allclose(product(matrix.T, x.mT), matrix.T.contiguous() @ x.mT, rtol=0, atol=1e-12)


def test_a_drawn_square_matrix_is_not_its_own_transpose(tmp_path: Path) -> None:
    graph = load(write_decoder(tmp_path / "model.onnx", Sizes(1, 256, 4, 4, 256, 50)))
    matrix = weights.Weights(graph, Paths(graph))["layers.0.query.weight"]
    assert matrix.shape == (256, 256)
    assert hankel(matrix)
    assert not torch.allclose(matrix, matrix.T, atol=1e-3)


def test_even_steps_are_views_and_others_copies() -> None:
    matrix = np.arange(240.0).reshape(10, 24)
    for order, shared in (
        (np.arange(24).reshape(4, 6), True),
        (np.arange(0, 24, 2), True),
        (np.array([3, 1, 2]), False),
    ):
        for axis, source in ((1, matrix), (0, matrix.T)):
            picked = pick(source, order, axis)
            assert np.array_equal(picked, np.take(source, order, axis))
            assert np.shares_memory(picked, matrix) == shared


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_drawn_weights_lead_to_the_same_sites(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {"bert": exported.bert, "llama": exported.llama, "gpt2": exported.gpt2}[name]()
    usual = exported.recognised(graph)
    monkeypatch.setattr(weights.Weights.__init__, "__defaults__", (None, 1))
    drawn = recognise(graph)
    assert [site.state for site in drawn.sites] == [State.LOWERABLE] * len(usual.sites)
    for one, other in zip(usual.attention, drawn.attention, strict=True):
        assert other.output is not None and one.output is not None
        pairs = [(a.weight_CGD, b.weight_CGD) for a, b in ((one.query, other.query), (one.value, other.value))]
        for a, b in (*pairs, (one.output.weight_HDC, other.output.weight_HDC), (one.key.bias_GD, other.key.bias_GD)):
            assert (a is None and b is None) or np.array_equal(a, b)
    for one, other in zip(usual.feed_forward, drawn.feed_forward, strict=True):
        assert np.array_equal(one.up_CF, other.up_CF)
        assert np.array_equal(one.down_FC, other.down_FC)


def test_a_large_decoder_is_found_without_reading_its_weights(tmp_path: Path) -> None:
    sizes = Sizes(layers=3, width=512, heads=8, kv_heads=2, hidden=768, vocabulary=300)
    graph = load(write_decoder(tmp_path / "model.onnx", sizes))
    found = recognise(graph)
    assert [site.state for site in found.sites] == [State.LOWERABLE] * 6
    for site in found.sites:
        own = site.query.weight_CGD if isinstance(site, AttentionSite) else site.up_CF
        name = site.query.weight_name if isinstance(site, AttentionSite) else site.weight_names["up"]
        stored = graph.constant(name)
        assert own is not None and stored is not None
        assert np.shares_memory(own, stored)
        assert np.array_equal(own.reshape(stored.shape), stored)
    first = found.attention[0]
    assert (first.kv_heads, first.position, first.causal) == (2, "rotary", True)
    assert isinstance(found.feed_forward[0], FeedForwardSite)


def test_an_interpreter_asks_given_constants_only_for_what_it_needs() -> None:
    graph = exported.block()

    class Asked(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            names.add(name)
            return super().__getitem__(name)

    names: set[str] = set()
    interpreter = Interpreter(graph, constants=Asked(Interpreter(graph).constants))
    assert not names
    interpreter.run({"x": np.zeros((1, 3, 24), np.float32)})
    assert names
