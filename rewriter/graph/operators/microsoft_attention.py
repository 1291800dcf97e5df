"""Attention operators of com.microsoft, as ONNX Runtime's CPU provider defines them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.attention import (
    causal_mask,
    merge_heads,
    repeat_heads,
    rotate_pairs,
    soft_cap,
    split_heads,
)
from rewriter.graph.operators.microsoft import DOMAIN
from rewriter.graph.operators.registry import Call, Result, operator

_LOWEST = torch.finfo(torch.float32).min


@operator("MultiHeadAttention", domain=DOMAIN)
def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *cache: Tensor | None,
) -> Result:
    """Attention over projected operands, separate or packed; a (B, heads, T, D) key needs no splitting."""
    if any(tensor is not None for tensor in cache):
        raise call.unsupported("a shared cache buffer")
    heads = call.need("num_heads")
    q, k, v = _operands(call, query, key, value, bias, heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    mask = _mask(call, padding, q.shape[2], k.shape[2])
    result, product = _attend(call, q, k, v, mask, attention_bias)
    return merge_heads(result), k, v, product


def _operands(
    call: Call, query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if query.ndim == 5:  # (B, S, heads, 3, D)
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
        return (q, k, v) if bias is None else _biased(call, q, k, v, bias)
    q = split_heads(query, heads)
    if key is None:
        raise call.unsupported("a query alone that is not packed")
    if key.ndim == 5:  # (B, T, heads, 2, D)
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
    elif key.ndim == 4:
        assert value is not None
        k, v = key, value
    else:
        assert value is not None
        k, v = split_heads(key, heads), split_heads(value, heads)
    if bias is None:
        return q, k, v
    return _biased(call, q, k, v, bias, query_only=key.ndim == 4)


def _biased(
    call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, query_only: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    parts = bias.split([heads * dim, heads * dim, heads * value_dim])
    q = q + parts[0].view(heads, 1, dim)
    if query_only:
        return q, k, v
    return q, k + parts[1].view(heads, 1, dim), v + parts[2].view(heads, 1, value_dim)


def _mask(call: Call, mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """What padding and causality add to the scores, broadcasting to (B, heads, S, T)."""
    fill, added = call.get("mask_filter_value", -10000.0), None
    if mask is not None:
        allowed = _allowed(mask, rows, columns)
        added = torch.where(allowed, 0.0, fill)
    if call.get("unidirectional"):
        causal = torch.where(causal_mask(rows, columns, columns - rows), 0.0, _LOWEST)
        added = causal if added is None else torch.clamp(added + causal, min=_LOWEST)
    return added


def _allowed(mask: Tensor, rows: int, columns: int) -> Tensor:
    """True where attending is allowed, from valid lengths (B,) or a mask of rank 2 to 4."""
    if mask.ndim == 1:
        return (torch.arange(columns) < mask[:, None])[:, None, None]
    shown = mask != 0
    if mask.ndim == 2:
        return shown[:, None, None, :]
    if mask.ndim == 3:
        return shown[:, None]
    return shown[:, :, columns - rows : columns, :columns]


def _attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = call.get("scale", 0.0) or q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1) @ v, scores


@operator("Attention", domain=DOMAIN)
def packed_attention(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_length: Tensor | None = None,
) -> Result:
    """Projections by one packed weight, then attention; `present` is (2, B, heads, T, D)."""
    if past_length is not None or call.get("do_rotary"):
        raise call.unsupported("rotation or a shared cache buffer")
    heads = call.need("num_heads")
    sizes = call.get("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3
    packed = x @ weight if bias is None else x @ weight + bias
    q, k, v = (split_heads(part, heads) for part in packed.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    if mask is not None and mask.ndim == 1 and mask.numel() == 2 * x.shape[0]:
        mask = _between(mask, k.shape[2])
    result, _ = _attend(call, q, k, v, _mask(call, mask, q.shape[2], k.shape[2]), attention_bias)
    present = torch.stack([k, v]) if call.wants(1) else None
    return merge_heads(result), present


def _between(mask: Tensor, columns: int) -> Tensor:
    """(B, T) from ends followed by starts of each row's valid part."""
    ends, starts = mask.reshape(2, -1, 1)
    steps = torch.arange(columns)
    return ((steps >= starts) & (steps < ends)).to(torch.int32)


@operator("RotaryEmbedding", domain=DOMAIN)
def rotary_embedding(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation by table rows at `positions`: (B, S), or one offset for all."""
    size = 2 * cos.shape[-1]
    flat = x.ndim == 3
    if flat:
        x = split_heads(x, call.get("num_heads", 0) or x.shape[-1] // size)
    rows = positions.long()
    if positions.numel() == 1:
        rows = positions.reshape(()).long() + torch.arange(x.shape[2])[None]
    result = rotate_pairs(x, cos[rows][:, None], sin[rows][:, None], size, bool(call.get("interleaved")))
    return merge_heads(result) if flat else result


@operator("GroupQueryAttention", domain=DOMAIN)
def group_query_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    last_index: Tensor,
    total_length: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    attention_bias: Tensor | None = None,
    sink: Tensor | None = None,
    *rest: Tensor | None,
) -> Result:
    """Causal grouped attention with a cache; `last_index` (B,) is each row's number of valid keys less one."""
    if any(tensor is not None for tensor in rest):
        raise call.unsupported("a quantised cache")
    heads, groups = call.need("num_heads"), call.need("kv_num_heads")
    if key is None or value is None:
        dim = query.shape[-1] // (heads + 2 * groups)
        query, key, value = query.split([heads * dim, groups * dim, groups * dim], -1)
    q, k, v = split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)
    tokens, total = q.shape[2], int(total_length)
    # The first call may be padded on the right: its rows start at 0 whatever their length.
    begin = (
        (last_index.long().reshape(-1) + 1 - tokens).clamp(min=0)
        if total > tokens
        else last_index.long().reshape(-1) * 0
    )
    at = begin[:, None] + torch.arange(tokens)
    if call.get("do_rotary") and cos is not None and sin is not None:
        rows = at if positions is None else positions.long()
        turn = (cos[rows][:, None], sin[rows][:, None], 2 * cos.shape[-1], bool(call.get("rotary_interleaved")))
        q, k = rotate_pairs(q, *turn), rotate_pairs(k, *turn)
    keys, values = _written(past_key, k, at, total), _written(past_value, v, at, total)
    ends = last_index.long().reshape(-1, 1, 1) + 1
    scores = _group_scores(call, q, keys, at, ends, attention_bias)
    weights = _with_sink(call, scores, sink)
    result = weights @ repeat_heads(values, heads)
    return merge_heads(result), keys, values


def _with_sink(call: Call, scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax, with a logit per head beside the keys if there is one; a smooth softmax has zeros there."""
    if sink is None and call.get("smooth_softmax", 0) <= 0:
        return torch.softmax(scores, -1)
    logits = torch.zeros(1, dtype=scores.dtype) if sink is None else sink.to(scores.dtype)
    column = logits.reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def _group_scores(call: Call, q: Tensor, keys: Tensor, at: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    scale = call.get("scale", 0.0) or q.shape[-1] ** -0.5
    scores = soft_cap((q @ repeat_heads(keys, q.shape[1]).transpose(-1, -2)) * scale, call.get("softcap", 0.0))
    if bias is not None:
        scores = scores + functional.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))
    steps, window = torch.arange(keys.shape[2]), call.get("local_window_size", -1)
    allowed = (steps <= at[..., None]) & (steps < ends)
    if window > 0:
        allowed = allowed & (steps > at[..., None] - window)
    return scores.masked_fill(~allowed[:, None], -torch.inf)


def _written(past: Tensor | None, new: Tensor, at: Tensor, total: int) -> Tensor:
    """The cache with new tokens at their places, long enough for all; past behind them is not taken over."""
    length = max(total, past.shape[2] if past is not None else 0)
    cache = new.new_zeros(new.shape[0], new.shape[1], length, new.shape[3])
    if past is not None:
        old = torch.arange(past.shape[2]) < at[:, :1]
        cache[:, :, : past.shape[2]] = past.masked_fill(~old[:, None, :, None], 0.0)
    return cache.scatter(2, at[:, None, :, None].expand(new.shape), new)


@operator("EmbedLayerNormalization", domain=DOMAIN)
def embed_layer_norm(
    call: Call,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    segment_table: Tensor | None,
    gain: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Result:
    """Layer norm of summed embeddings; also each row's number of valid tokens, and the sum."""
    rows = torch.arange(ids.shape[1])[None] if positions is None else positions.long()
    total = words[ids.long()] + places[rows]
    if segments is not None and segment_table is not None:
        total = total + segment_table[segments.long()]
    result = functional.layer_norm(total, total.shape[-1:], gain, beta, call.get("epsilon", 1e-12))
    lengths = torch.zeros(ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1, dtype=torch.int32)
    return result, lengths, total
