"""Torch models in all their forms give the same graph as far as recognition is concerned."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.attention.recognise import recognise
from rewriter.core.errors import ModelError, UserError
from rewriter.core.site import State
from rewriter.graph.torch_export import from_torch
from tests.attention import exported

AUTO = torch.export.Dim.AUTO


class Decoder(nn.Module):
    """Causal attention with rotary positions and grouped keys, then a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 24)
        self.query, self.output = nn.Linear(24, 24), nn.Linear(24, 24)
        self.key, self.value = nn.Linear(24, 12), nn.Linear(24, 12)
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, 6).transpose(1, 2) for p in (self.query, self.key, self.value))
        angles = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (y * cos + torch.cat([-y[..., 3:], y[..., :3]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(b, n, 24))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Encoder(nn.Module):
    """Two padded layers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=padded)


def _inputs(name: str) -> tuple[Tensor, ...]:
    if name == "decoder":
        return (exported.tokens(2, 9),)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    if name == "block":
        return (x,)
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, -2:] = True
    return x, padded


def _module(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {"decoder": Decoder, "encoder": Encoder, "block": exported.Block}
    return exported.randomise(made[name]()).eval()


@cache
def _program(name: str) -> torch.export.ExportedProgram:
    inputs = _inputs(name)
    shapes = tuple({0: AUTO, 1: AUTO} for _ in inputs)
    return torch.export.export(_module(name), inputs, dynamic_shapes=shapes, strict=False)


def _form(name: str, form: str) -> Any:
    if form == "module":
        return _module(name)
    if form == "symbolic_trace":
        return torch.fx.symbolic_trace(_module(name))
    program = _program(name)
    if form == "exported":
        return program
    return program.run_decompositions() if form == "decomposed" else program.module()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("decoder", "exported"),
        ("decoder", "graph_module"),
        ("encoder", "decomposed"),
        ("block", "module"),
        ("block", "symbolic_trace"),
    ],
)
def test_every_form_is_recognised(name: str, form: str) -> None:
    given = _form(name, form)
    inputs = _inputs(name)
    program = isinstance(given, torch.export.ExportedProgram)
    shapes = tuple({0: AUTO, 1: AUTO} for _ in inputs)
    graph = from_torch(given) if program else from_torch(given, inputs, dynamic_shapes=shapes)
    found = recognise(graph)
    assert not found.unrecognised
    assert [site.state for site in found.attention] == [State.LOWERABLE] * (2 if name == "encoder" else 1)
    assert all((site.heads, site.qk_dim) == (4, 6) for site in found.attention)
    assert len(found.feed_forward) == {"decoder": 1, "encoder": 2, "block": 0}[name]
    if name == "decoder":
        assert (found.attention[0].kv_heads, found.attention[0].position) == (2, "rotary")


def test_a_module_without_an_example_is_refused() -> None:
    with pytest.raises(UserError, match="example"):
        from_torch(nn.Linear(2, 2))


def test_what_torch_cannot_export_is_one_error() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(open("/nonexistent").read())  # noqa: PTH123

    with pytest.raises(ModelError, match="could not be exported"):
        from_torch(Odd(), (torch.ones(2),))


def test_the_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnxscript"):
        from_torch(nn.Linear(2, 2), (torch.ones(1, 2),))
