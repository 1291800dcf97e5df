from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.calibration.statistics import (
    HeadGramAccumulator,
    RegressionAccumulator,
    StreamRegression,
    centred,
    valid_keys,
)


def rows(seed: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features, output, residual = (
        torch.randn(count, width, generator=generator, dtype=torch.float64) + 0.5 for width in (7, 3, 3)
    )
    return features.to(dtype), output.to(dtype), residual.to(dtype)


def accumulated(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], around: float = 1.0) -> StreamRegression:
    weights = around * np.random.default_rng(8).normal(size=(parts[0][0].shape[1] + 1, 3))
    accumulator = RegressionAccumulator(weights)
    for part in parts:
        accumulator.add(*part)
    return accumulator.result()


def one_shot(seed: int, count: int) -> StreamRegression:
    features, output, residual = (part.numpy() for part in rows(seed, count))
    wide = np.hstack([features, np.ones((count, 1))])
    energies = np.array([np.sum(output**2), np.sum(output * residual), np.sum(residual**2)])
    return StreamRegression(wide.T @ wide, wide.T @ output, wide.T @ residual, energies, count)


def assert_same(found: StreamRegression, wanted: StreamRegression, tolerance: float) -> None:
    assert found.tokens == wanted.tokens
    for name in ("gram", "cross_output", "cross_residual", "energies"):
        scale = float(np.max(np.abs(getattr(wanted, name))))
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=tolerance * scale)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9000), max_size=6), order=st.randoms(use_true_random=False))
def test_any_chunking_and_order_give_the_same_sums(cuts: list[int], order: object) -> None:
    whole = rows(0, 9000)
    edges = [0, *sorted(cuts), 9000]
    parts = [tuple(part[a:b] for part in whole) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    assert_same(accumulated(parts), one_shot(0, 9000), 1e-12)  # type: ignore[arg-type]


def test_float32_products_summed_in_float64_lose_little() -> None:
    assert_same(accumulated([rows(1, 20_000, torch.float32)], around=0.0), one_shot(1, 20_000), 2e-6)


def test_loss_from_sums_is_the_loss_from_data() -> None:
    features, output, residual = (part.numpy() for part in rows(2, 300))
    stream = accumulated([rows(2, 300)])
    weights = np.random.default_rng(0).normal(size=(8, 3))
    for alpha in (0.0, 0.5, 1.0):
        error = features @ weights[:-1] + weights[-1] - output - alpha * residual
        np.testing.assert_allclose(stream.target(alpha).loss(weights), np.sum(error**2), rtol=1e-9)


def test_without_residual_alpha_does_nothing() -> None:
    features, output, _ = rows(3, 50)
    accumulator = RegressionAccumulator(np.zeros((8, 3)))
    accumulator.add(features, output)
    stream = accumulator.result()
    np.testing.assert_array_equal(stream.target(1.0).cross, stream.target(0.0).cross)
    assert stream.target(1.0).energy == stream.target(0.0).energy


def test_without_output_it_is_what_the_weights_make() -> None:
    features, _, residual = rows(3, 50)
    weights = np.random.default_rng(0).normal(size=(8, 3))
    given, made = RegressionAccumulator(weights), RegressionAccumulator(weights)
    given.add(features, features @ torch.from_numpy(weights[:-1]) + torch.from_numpy(weights[-1]), residual)
    made.add(features, None, residual)
    found, wanted = made.result(), given.result()
    for name in ("gram", "cross_output", "cross_residual"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.target(0.0).energy, wanted.target(0.0).energy, rtol=1e-12)


def test_losses_far_below_rounding_of_the_output_survive() -> None:
    features = rows(6, 4000, torch.float32)[0]
    weights = 100.0 * np.random.default_rng(0).normal(size=(8, 3))
    near = weights + 1e-4
    accumulator = RegressionAccumulator(weights)
    accumulator.add(features, None)
    regression = accumulator.result().target(0.0)
    exact = features.double().numpy() @ (near - weights)[:-1] + (near - weights)[-1]
    np.testing.assert_allclose(regression.loss(near), np.sum(exact**2), rtol=1e-2)
    assert np.sum(exact**2) < 1e-9 * regression.energy


def test_sums_add_and_map() -> None:
    both = accumulated([rows(4, 60)]) + accumulated([rows(5, 40)])
    assert_same(both, accumulated([rows(4, 60), rows(5, 40)]), 1e-12)
    matrix = np.random.default_rng(1).normal(size=(7, 4))
    features, output, residual = rows(4, 60)
    mapped = accumulated([(features @ torch.from_numpy(matrix), output, residual)])
    assert_same(accumulated([rows(4, 60)]).map(matrix), mapped, 1e-12)
    kept = np.array([5, 1])
    assert_same(accumulated([rows(4, 60)]).map(kept), accumulated([(features[:, kept], output, residual)]), 1e-12)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RegressionAccumulator(np.zeros((8, 3))).result()
    with pytest.raises(ValueError, match="no rows"):
        HeadGramAccumulator().result()


def test_head_grams() -> None:
    heads = torch.randn(5000, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    accumulator = HeadGramAccumulator()
    for part in heads.split(1234):
        accumulator.add(part)
    wanted = np.einsum("ngd,nge->gde", heads.numpy(), heads.numpy())
    np.testing.assert_allclose(accumulator.result(), wanted, rtol=1e-10, atol=1e-9)


class TestValidKeys:
    wanted = torch.tensor([[True, True, True, False], [True, True, False, False]])

    @pytest.mark.parametrize("masked", [-10_000.0, -3.4e38, -float("inf")])
    def test_additive_padding(self, masked: float) -> None:
        bias = torch.zeros(2, 1, 1, 4).masked_fill(~self.wanted[:, None, None], masked)
        assert torch.equal(valid_keys(bias, 2, 4), self.wanted)

    def test_boolean_padding_under_a_causal_mask(self) -> None:
        causal = torch.tril(torch.ones(4, 4, dtype=torch.bool))
        assert torch.equal(valid_keys(causal & self.wanted[:, None, None], 2, 4), self.wanted)

    def test_position_bias_is_no_mask(self) -> None:
        distance = torch.arange(4)[:, None] - torch.arange(4)[None]
        assert valid_keys(-8.0 * distance.abs()[None, None].float(), 2, 4).all()

    def test_fewer_axes_and_no_bias(self) -> None:
        assert torch.equal(valid_keys(self.wanted[1:].reshape(1, 4), 2, 4), self.wanted[1:].expand(2, 4))
        assert valid_keys(None, 2, 4).shape == (2, 4)


def test_centring_ignores_padding() -> None:
    keys = torch.randn(2, 5, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    other = keys.clone()
    other[1, 3:] = 1e6
    first, second = centred(keys, valid), centred(other, valid)
    torch.testing.assert_close(first[valid], second[valid])
    assert float(first[1, :3].sum(dim=0).abs().max()) < 1e-12
