"""What kernels should compute, in plain numpy and independent of them: the first test of every candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from scipy.special import erf

from rewriter.runtimes.tvm.kernels import formats
from rewriter.runtimes.tvm.kernels.attention import Attention, Operand
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision
from rewriter.runtimes.tvm.kernels.gemm_bf16 import rounded
from rewriter.runtimes.tvm.kernels.quantise import LEVELS, TINY

Array = NDArray[np.float32]
# What a right kernel may differ by on results of about one: bytes may be rounded the other way at a tie.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "bf16": 1e-2, "int8": 3e-2}
ACTIVATIONS: Mapping[str, Callable[[Array], Any]] = {
    "": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1.0 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
}


def rounded_rows(x: Array, precision: Precision) -> Array:
    """Activations as a format holds them: bfloat16, or 255 levels between the least and the largest of a row and 0."""
    if precision == "fp32":
        return x
    if precision == "bf16":
        return rounded(x)
    low, high = x.min(-1, keepdims=True, initial=0.0), x.max(-1, keepdims=True, initial=0.0)
    scale = np.maximum(high - low, np.float32(TINY)) / np.float32(LEVELS)
    zero = np.rint(-low / scale)
    return np.asarray((np.rint(x / scale + zero) - zero) * scale, np.float32)


def gemm(spec: Gemm, a: Array, weight_KN: Array, bias: Array | None, residual: Array | None) -> Array:
    """activation(a @ weight + bias) + residual on operands rounded as `spec` says."""
    weight = formats.as_rounded(weight_KN, spec.precision)
    result = rounded_rows(a, spec.precision) @ weight
    result = ACTIVATIONS[spec.activation](result if bias is None else result + bias)
    return np.asarray(result if residual is None else result + residual, np.float32)


def attention(spec: Attention, operands: Sequence[Array]) -> Array:
    """softmax(cap(scale Q K^T)) V as (B, S, H * Dv), where masks hide nothing and logits of sinks are zero.

    `operands` are the buffers that Q, K and V lie in. Scores of one head are held at a time.
    """
    maps = (spec.query_head_of, spec.key_head_of, spec.value_head_of)
    parts = zip(operands, (spec.query, spec.key, spec.value), (spec.S, spec.T, spec.T), strict=True)
    query, key, value = (_heads(array, operand, tokens, spec.B) for array, operand, tokens in parts)
    result = np.empty((spec.B, spec.S, spec.heads, spec.value.dim), np.float32)
    for head, (of_query, of_key, of_value) in enumerate(zip(*maps, strict=True)):
        scores = np.float32(spec.scale) * (query[:, of_query] @ key[:, of_key].swapaxes(-1, -2))
        if spec.softcap:
            scores = np.float32(spec.softcap) * np.tanh(scores / np.float32(spec.softcap))
        most = np.maximum(scores.max(-1, keepdims=True), 0.0 if spec.sink else -np.inf)
        weights = np.exp(scores - most)
        total = weights.sum(-1, keepdims=True) + (np.exp(-most) if spec.sink else 0.0)
        result[:, :, head] = (weights / total) @ value[:, of_value]
    return result.reshape(spec.B, spec.S, -1)


def _heads(array: Array, operand: Operand, tokens: int, batch: int) -> Array:
    """(B, heads, tokens, dim) of an operand inside its buffer."""
    flat, size = np.ascontiguousarray(array).reshape(-1)[operand.offset :], array.itemsize
    strides = tuple(size * step for step in (operand.batch, operand.head, operand.token, 1))
    return as_strided(flat, (batch, operand.heads, tokens, operand.dim), strides, writeable=False)
