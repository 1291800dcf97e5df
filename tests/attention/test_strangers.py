"""Forms that strangers write: masks of real numbers, stored patterns, learnt queries, weights used twice, windows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from rewriter.attention.recognise import recognise
from rewriter.core.rewrite import attention_refusal
from rewriter.core.site import Recognition, State
from tests.attention import exported

X, MASK = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0)), torch.ones(2, 10)
Mix = Callable[["Heads", Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """Four heads; `mix` makes the result of the tokens and a mask."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.patterns, self.query = nn.Parameter(torch.randn(1, 9, 24)), nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mix(self, x, mask) + 0 * mask.sum()

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.cut(self.q(queries)) @ self.cut(self.k(keys)).transpose(-1, -2) / 6**0.5

    def joined(self, weights: Tensor, x: Tensor) -> Tensor:
        y = (weights @ self.cut(self.v(x))).transpose(1, 2)
        return self.o(y.reshape(y.shape[0], y.shape[1], 24))

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 4, 6).transpose(1, 2)


def found_in(mix: Mix, mask: Tensor = MASK) -> Recognition:
    return recognise(exported.export(Heads(mix), (X, mask), ("x", "mask")))


def additive(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    return heads.joined((heads.scores(x, x) + (1 - mask[:, None, None]) * -1e4).softmax(-1), x)


def compared(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    return heads.joined(heads.scores(x, x).masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1), x)


def boolean(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    return heads.joined(torch.where(mask[:, None, None], heads.scores(x, x), torch.tensor(-1e30)).softmax(-1), x)


@pytest.mark.parametrize("mix", [additive, compared, boolean])
def test_masks_of_any_dtype_are_padding_and_nothing_else(mix: Mix) -> None:
    (site,) = found_in(mix, MASK.bool() if mix is boolean else MASK).attention
    assert (site.state, site.mask, site.position) == (State.LOWERABLE, "padding", "none")


def shrunk(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    seen = mask[:, None, None]
    return heads.joined((heads.scores(x, x) * seen + (1 - seen) * -1e10).softmax(-1), x)


def weighed(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    seen = mask[:, None, None]
    return heads.joined((heads.scores(x, x) + (1 - seen) * -1e4).softmax(-1) * seen, x)


@pytest.mark.parametrize("mix", [shrunk, weighed])
def test_what_holds_for_masks_of_zeros_and_ones_alone_is_not_claimed(mix: Mix) -> None:
    (site,) = found_in(mix).attention
    assert (site.state, [problem.code for problem in site.problems]) == (State.MAPPED, ["identity-under-masks"])


def stored_patterns(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
    return heads.joined(heads.scores(x, heads.patterns).softmax(-1), heads.patterns)


def test_a_lookup_in_stored_patterns_is_no_attention() -> None:
    """No token looks at another: it is a feed-forward with a softmax over its units, like a codebook."""
    assert found_in(stored_patterns) == Recognition((), (), ())


def pooled(heads: Heads, x: Tensor, mask: Tensor) -> Tensor:
    scores = heads.scores(heads.query.expand(x.shape[0], -1, -1), x)
    return heads.joined((scores + (1 - mask[:, None, None]) * -1e9).softmax(-1), x)


def test_pooling_by_a_learnt_query_is_attention_whose_queries_are_no_projection() -> None:
    (site,) = found_in(pooled).attention
    assert (site.state, site.heads, site.mask, site.position) == (State.LOWERABLE, 4, "padding", "none")
    assert site.query.opaque
    assert not site.query.mapped
    assert site.value.mapped
    refusal = attention_refusal(site)
    assert refusal is not None
    assert refusal.why.startswith("the weights of queries are not known per head: ")


def twice(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    y = heads.joined(heads.scores(x, x).masked_fill(later, -1e9).softmax(-1), x)
    return heads.joined((heads.scores(y, x) * 0.7).softmax(-1), x)


def test_weights_used_twice_differently_are_two_sites() -> None:
    """Each holds its own copy of the weights: what is done to one leaves the other."""
    first, second = found_in(twice).attention
    assert (first.state, first.causal, first.cross) == (State.LOWERABLE, True, False)
    assert (second.state, second.causal, second.cross) == (State.LOWERABLE, False, True)
    assert second.scale == pytest.approx(0.7 * first.scale)
    assert (first.output.weight_HDC == second.output.weight_HDC).all()


def windows(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
    q, k, v = (f(x)[:, :9].transpose(1, 2).reshape(-1, 24, 3, 3) for f in (heads.q, heads.k, heads.v))
    k, v = (unfold(each, 3, padding=1).reshape(-1, 4, 6, 9, 9) for each in (k, v))
    weights = ((q.reshape(-1, 4, 6, 1, 9) * k).sum(2, keepdim=True) / 6**0.5).softmax(3)
    return heads.o((weights * v).sum(3).reshape(-1, 24, 9).transpose(1, 2))


def test_products_written_as_multiplications_and_sums_are_named() -> None:
    found = found_in(windows)
    assert not found.attention
    assert [entry.refusal.code for entry in found.unrecognised] == ["product-form"]


def differential(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
    return heads.joined(heads.scores(x, x).softmax(-1) - 0.4 * heads.scores(x, x.flip(2)).softmax(-1), x)


def test_a_difference_of_two_softmaxes_is_mapped_with_its_reason() -> None:
    found = found_in(differential)
    states = [(site.state, {problem.code for problem in site.problems}) for site in found.attention]
    assert states == [(State.MAPPED, {"probabilities-changed"})] * 2
    assert not found.unrecognised


def gated(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
    return (heads.q(x).softmax(-1) * heads.v(x)).sum(-1, keepdim=True) * heads.k(x)


def test_a_gate_is_not() -> None:
    assert found_in(gated) == Recognition((), (), ())


def test_a_mask_made_of_lengths() -> None:
    def until(heads: Heads, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.arange(x.shape[1])[None] >= lengths[:, None]
        scores = heads.scores(x, x).masked_fill(hidden[:, None, None], -torch.inf)
        return heads.joined(scores.softmax(-1), x)

    (site,) = found_in(until, torch.tensor([10, 7])).attention
    assert site.state is State.LOWERABLE, site.problems
    assert site.mask == "padding"


def test_a_softmax_to_another_base_is_named() -> None:
    def doubled(heads: Heads, x: Tensor, _: Tensor) -> Tensor:
        powers = torch.pow(2.0, heads.scores(x, x))
        return heads.joined(powers / powers.sum(-1, keepdim=True), x)

    (site,) = found_in(doubled).attention
    assert (site.state, site.heads, site.qk_dim) == (State.MAPPED, 4, 6)
    assert [problem.code for problem in site.problems] == ["no-softmax"]
