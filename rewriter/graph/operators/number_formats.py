"""Products of linear layers in bfloat16 and 8-bit integers, rounded as the kernels round them.

bf16: both operands are rounded to nearest, ties to even; sums stay in the dtype of x. int8: each column of the weight
has levels -127 to 127 by its largest magnitude, each row (token) of x has 255 levels between its least and its largest
number and zero. Kernels add products exactly; fp32 here does up to 2^24, and to 1e-7 beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS, STEPS = 127.0, 254.0
TINY = 1e-30  # the least magnitude that is scaled by: rows and columns of zeros stay zeros


def rounded_product(x: Tensor, weight_CN: Tensor, precision: str) -> Tensor:
    """``x @ weight`` with operands rounded to a number format, bf16 or int8."""
    if precision == "bf16":
        return to_bf16(x) @ to_bf16(weight_CN)
    levels, scale = quantised_tokens(x)
    weight_levels, weight_scale = quantised_columns(weight_CN)
    return (levels @ weight_levels).mul_(scale).mul_(weight_scale)


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
    """(levels less the zero point, scale) with ``x ~ levels * scale``."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)
    span = (high - low).clamp_min(TINY)
    inverse = STEPS / span
    zero = torch.round(-low * inverse)
    return (x * inverse).add_(zero).round_().sub_(zero), span / STEPS
