"""The composite operators of `rewriter.graph.composites`, in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.composites import COMPOSITE_DOMAIN
from rewriter.graph.operators.attention import merge_heads, soft_cap, split_heads
from rewriter.graph.operators.linear import hankel, product
from rewriter.graph.operators.normalisation import rms
from rewriter.graph.operators.number_formats import rounded_product, softmax_to_bf16, to_bf16
from rewriter.graph.operators.registry import Call, operator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "identity": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@operator("Linear", domain=COMPOSITE_DOMAIN)
def linear(call: Call, x: Tensor, weight_CN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``act(x @ W + b)``, with x and W in a number format if `precision` names one."""
    activation = ACTIVATIONS[call.get("activation", "")]
    precision = call.get("precision", "fp32")
    if precision != "fp32":
        result = rounded_product(x, weight_CN, precision)
        return activation(result if bias_N is None else result + bias_N)
    if hankel(weight_CN):
        result = product(x, weight_CN)
        return activation(result if bias_N is None else result + bias_N)
    return activation(functional.linear(x, weight_CN.T, bias_N))


@operator("SplitHeads", domain=COMPOSITE_DOMAIN)
def split(call: Call, x_BSN: Tensor) -> Tensor:
    """(B, S, N) to (B, heads, S, N / heads)."""
    return split_heads(x_BSN, call.need("heads"))


@operator("Attention", domain=COMPOSITE_DOMAIN)
def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """``softmax(cap(scale * Q K^T) + bias) V`` as (B, S, H * Dv), both products in bfloat16 if `precision` says so."""
    q, k, v = (_operand(call, tensor, role) for tensor, role in ((query, "query"), (key, "key"), (value, "value")))
    scale, narrow = call.get("scale", 1.0), call.get("precision", "fp32") == "bf16"
    if not narrow and kept is None and sink is None and _fused_form_agrees(call, q, bias):
        mask = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
        return merge_heads(functional.scaled_dot_product_attention(q, k, v, mask, scale=call.get("scale", 1.0)))
    q, k, v = (to_bf16(q), to_bf16(k * scale), to_bf16(v)) if narrow else (q * scale, k, v)
    scores = soft_cap(q @ k.transpose(-1, -2), call.get("softcap", 0.0))
    if kept is not None:
        scores = torch.where(kept, scores, torch.zeros((), dtype=scores.dtype))
    if bias is not None:
        kind = call.get("bias_kind", "add")
        scores = scores.masked_fill(~bias, -torch.inf) if kind == "bool" else scores + bias
    if sink is not None:
        column = sink.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = softmax_to_bf16(scores) if narrow else torch.softmax(scores, -1)
    weights = weights if sink is None else weights[..., :-1]
    if bias is not None and call.get("empty_rows", "nan") == "zero":
        weights = torch.where(torch.isnan(weights), torch.zeros_like(weights), weights)
    return merge_heads(weights @ v)


def _fused_form_agrees(call: Call, q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's fused attention means the same: fp32, no cap, and no row without a key that may be attended to.

    It saves half of the time of calibration, and rows without any key are where its meaning differs.
    """
    if q.dtype != torch.float32 or call.get("softcap", 0.0):
        return False
    if bias is None:
        return True
    allowed = bias if bias.dtype == torch.bool else bias > -torch.inf
    return bias.dtype != torch.float64 and bool(allowed.any(-1).all())


def _operand(call: Call, x: Tensor, role: str) -> Tensor:
    """(B, H, tokens, D): heads split, then picked for every query head."""
    heads = call.need(f"{role}_heads")
    x = split_heads(x, heads) if x.ndim == 3 else x
    picks = call.get(f"{role}_head_of") or list(range(heads))
    return x if picks == list(range(heads)) else x[:, picks]


@operator("Rotary", domain=COMPOSITE_DOMAIN)
def rotary(call: Call, x_BGSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Leading dims ``u`` become ``u * cos + sign * rotate(u) * sin``; ``rotate`` is (-second, first) of each pair."""
    size = call.need("size")
    turned, kept = x_BGSD[..., :size], x_BGSD[..., size:]
    if call.get("interleaved", 0):
        rotated = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        rotated = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    result = turned * cos + call.get("sign", 1) * rotated * sin
    return torch.cat([result, kept], -1) if kept.shape[-1] else result


@operator("HeadNorm", domain=COMPOSITE_DOMAIN)
def head_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer or RMS norm over the last axis."""
    epsilon = call.get("epsilon", 1e-5)
    if call.get("kind", "layer") == "layer":
        return functional.layer_norm(x, x.shape[-1:], gain, bias, epsilon)
    result = rms(x, [-1], epsilon) * gain
    return result if bias is None else result + bias
