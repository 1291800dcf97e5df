"""Attention written by hand in plain torch: packed projections, 1x1 convolutions, torch's own modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.families.family import (
    BATCH,
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    TEXT,
    TOKENS,
    WIDTH,
    Example,
    Family,
    Form,
    padding,
)


def hidden(tokens: int = TOKENS) -> Tensor:
    """(B, tokens, WIDTH)."""
    return torch.randn(BATCH, tokens, WIDTH)


def split_heads(x_BSC: Tensor) -> Tensor:
    """(B, S, H*D) -> (B, H, S, D)."""
    return x_BSC.reshape(x_BSC.shape[0], x_BSC.shape[1], HEADS, -1).transpose(1, 2)


def merge_heads(x_BHSD: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, S, H*D)."""
    return x_BHSD.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    """(B, H, S, D) each."""
    if form == "sdpa":
        return nn.functional.scaled_dot_product_attention(query, key, value)
    return (query * HEAD_DIM**-0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


class PackedAttention(nn.Module):
    """One weight for Q, K and V, split by unbind or by chunk, with or without norms on Q and K; residual."""

    def __init__(self, split: Literal["unbind", "chunk"], form: Form, norm: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.split, self.form = split, form
        self.q_norm = nn.LayerNorm(HEAD_DIM) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(HEAD_DIM) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        if self.split == "unbind":
            packed = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, HEAD_DIM)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, -1))
        return x + self.proj(merge_heads(attend(self.q_norm(q), self.k_norm(k), v, self.form)))


class ConvolutionAttention(nn.Module):
    """Attention over pixels with 1x1 convolutions as projections, channels first."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same."""
        b, c, height, width = x.shape
        q, k, v = (part.reshape(b, HEADS, c // HEADS, height * width) for part in self.qkv(x).chunk(3, 1))
        if self.form == "sdpa":
            out = attend(*(part.transpose(2, 3) for part in (q, k, v)), self.form).transpose(2, 3)
        else:
            weights = torch.einsum("bhdi,bhdj->bhij", q * HEAD_DIM**-0.5, k).softmax(-1)
            out = torch.einsum("bhij,bhdj->bhdi", weights, v)
        return x + self.out(out.reshape(b, c, height, width))


class CrossAttention(nn.Module):
    """torch's MultiheadAttention on two sources, with or without its averaged probabilities as an output."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, q: Tensor, k: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, S, C) and (B, T, C)."""
        out, weights = self.attention(q, k, k, need_weights=self.need_weights)
        return (out, weights) if self.need_weights else out


class PaddedEncoder(nn.Module):
    """torch's TransformerEncoder with a key padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """(B, S, C) and (B, S), True where padded."""
        return self.encoder(x, src_key_padding_mask=padded)


def hidden_example(module: nn.Module) -> Example:
    """A module of hidden states."""
    return Example(module, (hidden(),), ("x",), (TEXT,))


def _cross(need_weights: bool) -> Example:
    return Example(CrossAttention(need_weights), (hidden(), hidden(7)), ("q", "k"), (TEXT, {0: "batch", 1: "kseq"}))


def _padded(form: Form) -> Example:
    return Example(PaddedEncoder(), (hidden(), padding() == 0), ("x", "padded"), (TEXT, TEXT))


def _pixels(form: Form) -> Example:
    return Example(ConvolutionAttention(form), (torch.randn(BATCH, WIDTH, 6, 6),), ("x",), ({0: "batch"},))


TORCH_MODULES = (
    Family("packed_unbind", lambda form: hidden_example(PackedAttention("unbind", form)), 1, "vit"),
    Family("packed_chunk", lambda form: hidden_example(PackedAttention("chunk", form)), 1, "vit"),
    Family("packed_qk_norm", lambda form: hidden_example(PackedAttention("unbind", form, norm=True)), 1, "vit"),
    Family("conv1x1", _pixels, 1, "unet"),
    Family("torch_mha", lambda form: _cross(False), 1, sdpa=False),
    Family("torch_mha_weights", lambda form: _cross(True), 1, sdpa=False),
    Family("torch_encoder", _padded, LAYERS, sdpa=False),
)
