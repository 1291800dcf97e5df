"""The standard's Attention and RotaryEmbedding, opset 23 and later."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, Result, operator


def split_heads(x_BSN: Tensor, heads: int) -> Tensor:
    """(B, S, heads * D) to (B, heads, S, D)."""
    b, s, width = x_BSN.shape
    return x_BSN.reshape(b, s, heads, width // heads).transpose(1, 2)


def merge_heads(x_BHSD: Tensor) -> Tensor:
    """(B, heads, S, D) to (B, S, heads * D)."""
    return x_BHSD.transpose(1, 2).flatten(2)


def soft_cap(scores: Tensor, cap: float) -> Tensor:
    """``cap * tanh(scores / cap)``; 0 leaves them alone (Bello et al., arXiv 1611.09940)."""
    return cap * torch.tanh(scores / cap) if cap else scores


def repeat_heads(x_BGSD: Tensor, heads: int) -> Tensor:
    """Every head of grouped keys or values repeated for its query heads (Ainslie et al., arXiv 2305.13245)."""
    group = heads // x_BGSD.shape[1]
    return x_BGSD if group == 1 else x_BGSD.repeat_interleave(group, 1)


def causal_mask(rows: int, columns: int, past: int | Tensor = 0) -> Tensor:
    """True where column <= row + past."""
    return torch.arange(columns) <= torch.arange(rows)[:, None] + past


@operator("Attention", since=23)
def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    valid_lengths: Tensor | None = None,
) -> Result:
    """``softmax(cap(scale * Q K^T) + mask) V``; rows without any allowed key are zero.

    The causal mask is aligned at the top left, shifted by the length of the past. `valid_lengths` (B,) hides keys.
    """
    flat = query.ndim == 3
    if flat:
        query = split_heads(query, call.need("q_num_heads"))
        key, value = (split_heads(x, call.need("kv_num_heads")) for x in (key, value))
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    scale = call.get("scale")
    product = (query @ repeat_heads(key, query.shape[1]).transpose(-1, -2)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    capped = soft_cap(product, call.get("softcap", 0.0))
    scores = _masked(call, capped, mask, past, valid_lengths)
    weights = (
        torch.nan_to_num(torch.softmax(scores, -1), nan=0.0) if torch.isneginf(scores).any() else scores.softmax(-1)
    )
    result = weights @ repeat_heads(value, query.shape[1])
    # Mode 1 is after the soft-cap where it comes first (onnx 1.20), mode 2 after the mask as well.
    kept = (
        {0: product, 1: capped, 2: scores, 3: weights}[call.get("qk_matmul_output_mode", 0)] if call.wants(3) else None
    )
    return (merge_heads(result) if flat else result), key, value, kept


def _masked(call: Call, scores: Tensor, mask: Tensor | None, past: int, valid_lengths: Tensor | None) -> Tensor:
    rows, columns = scores.shape[-2:]
    if valid_lengths is not None:
        shown = torch.arange(columns) < valid_lengths[:, None, None, None]
        scores = scores.masked_fill(~shown, -math.inf)
    if call.get("is_causal"):
        shift: int | Tensor = past
        if valid_lengths is not None and not past:
            shift = (valid_lengths[:, None, None, None] - rows).clamp(min=0)
        scores = scores.masked_fill(~causal_mask(rows, columns, shift), -math.inf)
    if mask is None:
        return scores
    if mask.shape[-1] < columns:  # the standard lets a mask be shorter than the keys: the rest is hidden
        fill = False if mask.dtype == torch.bool else -math.inf
        mask = functional.pad(mask, (0, columns - mask.shape[-1]), value=fill)
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


@operator("RotaryEmbedding", since=23)
def rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Pairs of dims turned by angles (Su et al., arXiv 2104.09864); tables hold half the turned dims."""
    flat = x.ndim == 3
    if flat:
        x = split_heads(x, call.need("num_heads"))
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    size = call.get("rotary_embedding_dim", 0) or x.shape[-1]
    half = size // 2
    result = rotate_pairs(x, cos[:, None, :, :half], sin[:, None, :, :half], size, bool(call.get("interleaved")))
    return merge_heads(result) if flat else result


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool) -> Tensor:
    """The leading `size` dims turned; `cos` and `sin` broadcast to half of them."""
    turned, kept = x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned
