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
    weights = _probabilities(call, scores)
    result = weights @ repeat_heads(value, query.shape[1])
    # What the fourth output shows: the product, after the soft-cap, after the mask as well, or the probabilities.
    shown = (product, capped, scores, weights)[call.get("qk_matmul_output_mode", 0)]
    kept = shown if call.wants(3) else None
    return (merge_heads(result) if flat else result), key, value, kept


def _probabilities(call: Call, scores: Tensor) -> Tensor:
    """Softmax in the precision asked for; a row without any allowed key gives zeros."""
    precision = call.get("softmax_precision")
    weights = torch.softmax(scores.to(call.dtype(precision)) if precision else scores, -1).to(scores.dtype)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    return weights.masked_fill(empty, 0.0) if bool(empty.any()) else weights


def _masked(call: Call, scores: Tensor, mask: Tensor | None, past: int, valid_lengths: Tensor | None) -> Tensor:
    rows, columns = scores.shape[-2:]
    shift: int | Tensor = past
    if valid_lengths is not None:
        lengths = valid_lengths.reshape(-1, 1, 1, 1)
        scores = scores.masked_fill(torch.arange(columns) >= lengths, -math.inf)
        shift = past or lengths - rows
    if call.get("is_causal"):
        scores = scores.masked_fill(~causal_mask(rows, columns, shift), -math.inf)
    scores = _windowed(call, scores, shift)
    if mask is None:
        return scores
    if mask.shape[-1] < columns:  # the standard lets a mask be shorter than the keys: the rest is hidden
        fill = False if mask.dtype == torch.bool else -math.inf
        mask = functional.pad(mask, (0, columns - mask.shape[-1]), value=fill)
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _windowed(call: Call, scores: Tensor, shift: int | Tensor) -> Tensor:
    """Keys hidden that lie further from the query than the window reaches on its side."""
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    if left < 0 and right < 0:
        return scores
    rows, columns = scores.shape[-2:]
    distance = torch.arange(columns) - (torch.arange(rows)[:, None] + shift)
    hidden = (distance < -left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    return scores.masked_fill(hidden | (distance > right) if right >= 0 else hidden, -math.inf)


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
