"""One attention, spelled in ways that no pattern list holds. All must come out the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import OnnxGraph
from tests.attention.exported import export, tokens

SCALE = 6**-0.5


class Spelled(nn.Module):
    """Four heads of six dims over embedded tokens; `spelling` names how scores, softmax and products are written."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.table = nn.Embedding(61, 24)
        self.query, self.output = nn.Linear(24, 24), nn.Linear(24, 24)
        groups = 12 if spelling == "grouped_5d" else 24
        self.key, self.value = nn.Linear(24, groups), nn.Linear(24, groups)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        b, n, _ = x.shape
        heads = [p(x).view(b, n, -1, 6) for p in (self.query, self.key, self.value)]
        context_BSHD = getattr(self, self.spelling)(*heads, mask[:, None, None, :])
        return self.output(context_BSHD.reshape(b, n, 24))

    @staticmethod
    def scores(q: Tensor, k: Tensor) -> Tensor:
        return q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2) * SCALE

    @staticmethod
    def mix(weights: Tensor, v: Tensor) -> Tensor:
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    def filled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.mix(self.scores(q, k).masked_fill(mask == 0, -1e4).softmax(-1), v)

    def filled_inf(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.mix(self.scores(q, k).masked_fill(mask == 0, -torch.inf).softmax(-1), v)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE + (1 - mask.float()) * -1e9
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    def written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(q, k) + (1 - mask.float()) * -1e9
        raised = (scores - scores.amax(-1, keepdim=True)).exp()
        return self.mix(raised / raised.sum(-1, keepdim=True), v)

    def grouped_5d(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, n = q.shape[:2]
        q = q.transpose(1, 2).view(b, 2, 2, n, 6)
        k, v = (y.transpose(1, 2)[:, :, None] for y in (k, v))
        return ((q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v).view(b, 4, n, 6).transpose(1, 2)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def rotated(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        angles = torch.arange(q.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01])
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]

        def turn(y: Tensor) -> Tensor:
            one, two = y[..., 0::2], y[..., 1::2]
            return torch.stack((one * cos - two * sin, one * sin + two * cos), -1).flatten(-2)

        return self.mix((self.scores(turn(q), turn(k)) + (1 - mask.float()) * -1e9).softmax(-1), v)


@cache
def graph(spelling: str) -> OnnxGraph:
    return export(Spelled(spelling), [tokens(), torch.ones(2, 9, dtype=torch.int64)], ["ids", "mask"])


EXPECTED = {
    "filled": ("fill", "padding", "none"),
    "filled_inf": ("fill", "padding", "none"),
    "einsum": ("value", "padding", "none"),
    "written_out": ("value", "padding", "none"),
    "grouped_5d": ("none", "none", "none"),
    "causal": ("value", "causal", "none"),
    "rotated": ("value", "padding", "rotary"),
}


@pytest.mark.parametrize("spelling", EXPECTED)
def test_every_spelling_is_the_same_attention(spelling: str) -> None:
    result = recognise(graph(spelling))
    (site,) = result.attention
    assert site.state is State.LOWERABLE, site.problems
    assert not result.unrecognised
    assert (site.bias.kind, site.mask, site.position) == EXPECTED[spelling]
    assert (site.heads, site.kv_heads, site.qk_dim) == (4, 2 if spelling == "grouped_5d" else 4, 6)
    assert site.scale == pytest.approx(SCALE, rel=1e-6)


def test_half_tables_and_their_axes_are_kept() -> None:
    (site,) = recognise(graph("rotated")).attention
    assert site.query.rotary is not None
    assert site.query.rotary.interleaved
    assert site.query.rotary.table_form == ("swap", "double")
