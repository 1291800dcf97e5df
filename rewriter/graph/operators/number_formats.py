"""Products of linear layers in bfloat16 and 8-bit integers, rounded exactly as the kernels round them.

bf16: both operands are rounded to nearest, ties to even; sums stay in the dtype of x. int8: symmetric levels -127 to
127 by the largest magnitude, of each column of the weight and of each row (token) of x; sums are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127.0
TINY = 1e-30  # the least magnitude that is scaled by: rows and columns of zeros stay zeros
_EXACT_TERMS = 1024  # products of levels that fp32 adds without rounding: 1024 * 127^2 < 2^24


def rounded_product(x: Tensor, weight_CN: Tensor, precision: str) -> Tensor:
    """``x @ weight`` with operands rounded to a number format, bf16 or int8."""
    if precision == "bf16":
        return x.to(torch.bfloat16).to(x.dtype) @ weight_CN.to(torch.bfloat16).to(x.dtype)
    levels, scale = quantised(x, -1)
    weight_levels, weight_scale = quantised(weight_CN, 0)
    return _exact(levels, weight_levels) * (scale * weight_scale)


def quantised(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(levels, scale) with ``x ~ levels * scale``, by the largest magnitude along `axis`; whole numbers as floats."""
    largest = x.abs().amax(axis, keepdim=True).clamp_min(TINY)
    # The product is rounded once, as by a fused multiply-add: fp32 products are exact in float64.
    levels = torch.round(x.to(torch.float64) * (LEVELS / largest).to(torch.float64))
    return levels.to(x.dtype), largest / LEVELS


def _exact(levels: Tensor, weight_levels: Tensor) -> Tensor:
    """The product of whole numbers, without rounding in fp32 either."""
    if levels.dtype == torch.float64:
        return levels @ weight_levels
    parts = zip(levels.split(_EXACT_TERMS, -1), weight_levels.split(_EXACT_TERMS, 0), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for left, right in parts:
        total = total + (left.float() @ right.float()).to(torch.float64)
    return total.to(levels.dtype)
