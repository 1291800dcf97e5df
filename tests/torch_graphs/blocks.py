"""Tiny seeded torch modules, one per way of writing attention, and the five forms a torch model comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.attention import exported

AUTO = torch.export.Dim.AUTO
WIDTH, HEADS, DIM = 24, 4, 6
FREE = {0: AUTO, 1: AUTO}
FORMS = ("exported", "decomposed", "graph_module", "symbolic_trace", "module")


class Block(nn.Module):
    """Projections, an attention that `mix` writes, a feed-forward; `groups` is the number of key heads."""

    def __init__(self, groups: int = HEADS) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, groups * DIM), nn.Linear(WIDTH, groups * DIM)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each (B, heads, S, D)."""
        b, n = x.shape[0], x.shape[1]
        return tuple(p(x).view(b, n, -1, DIM).transpose(1, 2) for p in (self.query, self.key, self.value))

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Both residual connections."""
        x = x + self.output(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Sdpa(Block):
    """Torch's own attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x, functional.scaled_dot_product_attention(*self.heads(x)))


class Causal(Block):
    """Torch's own, causal, with grouped keys."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.rest(x, functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Eager(Block):
    """Written out, with an additive mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / DIM**0.5 + (1.0 - mask[:, None, None, :]) * -1e4
        return self.rest(x, torch.softmax(scores, -1) @ v)


class Filled(Block):
    """Written out, with `masked_fill`."""

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(padded[:, None, None, :], -1e9)
        return self.rest(x, torch.softmax(scores, -1) @ v)


class Capped(Block):
    """With a soft cap on the scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = 5.0 * torch.tanh(q @ k.transpose(-1, -2) * (DIM**-0.5 / 5.0))
        return self.rest(x, torch.softmax(scores, -1) @ v)


class Biased(Block):
    """With a learned bias per head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        place = torch.arange(x.shape[1])
        bias = self.table((place[:, None] - place[None]).abs()).permute(2, 0, 1)[None]
        return self.rest(x, torch.softmax(q @ k.transpose(-1, -2) * DIM**-0.5 + bias, -1) @ v)


class Rotary(Block):
    """Rotary positions before torch's own attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01])
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (y * cos + torch.cat([-y[..., 3:], y[..., :3]], -1) * sin for y in (q, k))
        return self.rest(x, functional.scaled_dot_product_attention(q, k, v))


class Packed(Block):
    """One projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        del self.query, self.key, self.value

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[0], x.shape[1]
        q, k, v = self.packed(x).view(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return self.rest(x, functional.scaled_dot_product_attention(q, k, v))


class Cross(Block):
    """Keys and values from another sequence, which comes in a dict by keyword."""

    def forward(self, x: Tensor, *, other: dict[str, Tensor]) -> Tensor:
        q, memory = self.heads(x)[0], other["memory"]
        _, k, v = self.heads(memory)
        return self.rest(x, functional.scaled_dot_product_attention(q, k, v))


class Normed(Block):
    """Queries and keys with a norm over the head's dims."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.rest(x, functional.scaled_dot_product_attention(self.first(q), self.second(k), v))


class Layer(nn.Module):
    """Torch's encoder layer, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True, activation="gelu")

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=padded)


class Shared(Block):
    """The same weights twice."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.rest(x, functional.scaled_dot_product_attention(*self.heads(x)))
        return x


@dataclass(frozen=True)
class Family:
    """A module with an example."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: Any = None
    attentions: int = 1


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _padding(kind: torch.dtype) -> Tensor:
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[0, -2:] = True
    return padded if kind is torch.bool else (~padded).to(kind)


ONE, TWO = (_numbers(2, 9, WIDTH),), (_numbers(2, 9, WIDTH), _padding(torch.bool))
FAMILIES = {
    "sdpa": Family(Sdpa, ONE),
    "causal": Family(Causal, ONE),
    "eager": Family(Eager, (*ONE, _padding(torch.float32)), shapes=(FREE, FREE)),
    "filled": Family(Filled, TWO, shapes=(FREE, FREE)),
    "capped": Family(Capped, ONE),
    "biased": Family(Biased, ONE),
    "rotary": Family(Rotary, ONE),
    "packed": Family(Packed, ONE),
    "cross": Family(
        Cross,
        ONE,
        {"other": {"memory": _numbers(2, 7, WIDTH)}},
        {"x": FREE, "other": {"memory": FREE}},
    ),
    "normed": Family(Normed, ONE),
    "layer": Family(Layer, TWO, shapes=(FREE, FREE)),
    "shared": Family(Shared, ONE, attentions=2),
}


def built(name: str) -> nn.Module:
    """The module of a family, with noise on every parameter."""
    torch.manual_seed(0)
    return exported.randomise(FAMILIES[name].make()).eval()


def in_form(name: str, form: str) -> tuple[Any, dict[str, Any]]:
    """(model, arguments of `rewriter.sites` beside it)."""
    family, module = FAMILIES[name], built(name)
    example = {"inputs": family.inputs, "kwargs": family.kwargs, "dynamic_shapes": family.shapes or (FREE,)}
    if form == "module":
        return module, example
    if form == "symbolic_trace":
        return torch.fx.symbolic_trace(module), example
    program = torch.export.export(
        module, family.inputs, family.kwargs, dynamic_shapes=example["dynamic_shapes"], strict=False
    )
    if form == "exported":
        return program, {}
    if form == "decomposed":
        return program.run_decompositions(), {}
    return program.module(), example
