"""Products of linear layers in bfloat16 and 8-bit integers, rounded exactly as the kernels round them.

bf16: both operands are rounded to nearest, ties to even; sums stay in the dtype of x. int8: each column of the
weight has levels -127 to 127 by its largest magnitude, each row (token) of x has 255 levels between its least and its
largest number and zero; sums are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS, STEPS = 127.0, 254.0
TINY = 1e-30  # the least magnitude that is scaled by: rows and columns of zeros stay zeros
_EXACT_TERMS = 512  # products of levels that fp32 adds without rounding: 512 * 127 * 255 < 2^24


def rounded_product(x: Tensor, weight_CN: Tensor, precision: str) -> Tensor:
    """``x @ weight`` with operands rounded to a number format, bf16 or int8."""
    if precision == "bf16":
        return to_bf16(x) @ to_bf16(weight_CN)
    levels, scale = quantised_tokens(x)
    weight_levels, weight_scale = quantised_columns(weight_CN)
    return _exact(levels, weight_levels) * (scale * weight_scale)


def to_bf16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in the dtype of x."""
    return x.to(torch.bfloat16).to(x.dtype)


def softmax_to_bf16(scores: Tensor) -> Tensor:
    """Softmax over the last axis whose exponentials, but not their sum, are rounded to bfloat16."""
    raised = torch.exp(scores - scores.amax(-1, keepdim=True))
    return to_bf16(raised) / raised.sum(-1, keepdim=True)


def quantised_columns(weight_CN: Tensor) -> tuple[Tensor, Tensor]:
    """(levels, scale) with ``weight ~ levels * scale``; levels are whole numbers as floats."""
    largest = weight_CN.abs().amax(0, keepdim=True).clamp_min(TINY)
    return torch.round(weight_CN * (LEVELS / largest)), largest / LEVELS


def quantised_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(levels less the zero point, scale) with ``x ~ levels * scale``, as the kernels compute them."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)
    span = (high - low).clamp_min(TINY)
    # Sums are rounded once, as by a fused multiply-add: fp32 products are exact in float64.
    inverse = (STEPS / span).to(torch.float64)
    zero = torch.round(-low.to(torch.float64) * inverse)
    levels = torch.round(x.to(torch.float64) * inverse + zero) - zero
    return levels.to(x.dtype), span / STEPS


def _exact(levels: Tensor, weight_levels: Tensor) -> Tensor:
    """The product of whole numbers, without rounding in fp32 either."""
    if levels.dtype == torch.float64:
        return levels @ weight_levels
    parts = zip(levels.split(_EXACT_TERMS, -1), weight_levels.split(_EXACT_TERMS, 0), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for left, right in parts:
        total = total + (left.float() @ right.float()).to(torch.float64)
    return total.to(levels.dtype)
