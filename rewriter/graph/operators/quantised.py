"""Quantised operators, computed on integers or by way of floats exactly as the standard defines them."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.graph.operators.convolution import convolved
from rewriter.graph.operators.registry import Call, operator
from rewriter.graph.tensors import torch_dtype

_RANGES = {ir.DataType.INT4: (-8, 7), ir.DataType.UINT4: (0, 15)}


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scale or zero point (scalar, per axis or per block) made to broadcast against `x`."""
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis %= x.ndim
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


@operator("DequantizeLinear")
def dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``(x - zero) * scale``."""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    wide = x.to(torch.int32) if not x.is_floating_point() else x.to(scale.dtype)
    if zero is not None:
        wide = wide - _spread(zero.to(wide.dtype), x, axis, block)
    return wide.to(scale.dtype) * _spread(scale, x, axis, block)


@operator("QuantizeLinear")
def quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``saturate(round(x / scale) + zero)``, halves to even."""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    kind = call.get("output_dtype", 0)
    dtype = torch_dtype(kind) if kind else (torch.uint8 if zero is None else zero.dtype)
    ratio = x / _spread(scale, x, axis, block)
    if dtype.is_floating_point:
        return ratio.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    whole = torch.round(ratio)
    if zero is not None:
        whole = whole + _spread(zero.to(whole.dtype), x, axis, block)
    low, high = _limits(call, kind, dtype)
    return whole.clamp(low, high).to(dtype)


def _limits(call: Call, kind: int, dtype: torch.dtype) -> tuple[int, int]:
    value = call.node.inputs[2] if len(call.node.inputs) > 2 else None
    named = ir.DataType(kind) if kind else (value.dtype if value is not None else None)
    if named in _RANGES:
        return _RANGES[named]
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 with scale and zero point from the range of the data, zero included."""
    return _dynamically_quantised(x)


def _dynamically_quantised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(x: Tensor, zero: Tensor | None, rows: bool) -> Tensor:
    # Products of 8-bit numbers summed over fewer than 2^37 terms are exact in float64, and far faster than in integers.
    wide = x.to(torch.float64)
    if zero is None:
        return wide
    shift = zero.to(torch.float64)
    return wide - (shift[..., None] if rows and zero.ndim == 1 and zero.numel() > 1 else shift)


@operator("MatMulInteger")
def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Product of 8-bit matrices in int32."""
    return (_centred(a, a_zero, True) @ _centred(b, b_zero, False)).to(torch.int32)


@operator("QLinearMatMul")
def quantised_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Product of 8-bit matrices, quantised again."""
    product = _centred(a, a_zero, True) @ _centred(b, b_zero, False)
    row_scale = a_scale[..., None] if a_scale.ndim == 1 and a_scale.numel() > 1 else a_scale
    whole = torch.round(product * (row_scale.double() * b_scale.double() / y_scale.double())) + y_zero
    limits = torch.iinfo(y_zero.dtype)
    return whole.clamp(limits.min, limits.max).to(y_zero.dtype)


@operator("ConvInteger")
def conv_integer(
    call: Call, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """Convolution of 8-bit tensors in int32; padding is with the zero point."""
    shift = None if w_zero is None else w_zero.reshape([-1, *[1] * (w.ndim - 1)])
    return convolved(call, _centred(x, x_zero, False), _centred(w, shift, False), None).to(torch.int32)


@operator("MatMulIntegerToFloat", domain="com.microsoft")
def matmul_integer_to_float(
    call: Call,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Product of 8-bit matrices, scaled back to floats, as ONNX Runtime fuses it."""
    return _scaled_product(a, b, a_scale, b_scale, a_zero, b_zero, bias)


def _scaled_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    product = (_centred(a, a_zero, True) @ _centred(b, b_zero, False)).to(a_scale.dtype)
    result = product * (a_scale * b_scale)
    return result if bias is None else result + bias


@operator("DynamicQuantizeMatMul", domain="com.microsoft")
def dynamic_quantised_matmul(
    call: Call, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A float matrix quantised from its own range, times an 8-bit one."""
    quantised, scale, zero = _dynamically_quantised(a)
    return _scaled_product(quantised, b, scale, b_scale, zero, b_zero, bias)


@operator("MatMulNBits", domain="com.microsoft")
def matmul_n_bits(
    call: Call,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A float matrix times weights of 4 or 8 bits in blocks along the inner axis: `packed` is (N, blocks, bytes)."""
    bits, block, width, inner = (call.need(name) for name in ("bits", "block_size", "N", "K"))
    if bits not in (4, 8) or (groups is not None and groups.numel()):
        raise call.unsupported(f"{bits} bits" if bits not in (4, 8) else "a group index")
    result = a @ n_bits_weight(packed, scales, zeros, bits, block, width, inner).T.to(a.dtype)
    return result if bias is None else result + bias


def n_bits_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, width: int, inner: int
) -> Tensor:
    """The matrix (N, K) behind packed weights, in the dtype of their scales."""
    blocks = -(-inner // block)
    weight = _unpacked(packed.reshape(width, blocks, -1), bits)[..., :block].to(scales.dtype)
    zero = torch.tensor(2 ** (bits - 1), dtype=scales.dtype)
    if zeros is not None:
        whole = zeros if zeros.is_floating_point() else _unpacked(zeros.reshape(width, -1), bits)
        zero = whole.reshape(width, -1)[:, :blocks, None].to(scales.dtype)
    return ((weight - zero) * scales.reshape(width, blocks, 1)).reshape(width, -1)[:, :inner]


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """One number per element along the last axis, low half of each byte first."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
