"""Products of matrices."""

from __future__ import annotations

import scipy.fft
import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, operator

SMALLEST_HANKEL = 4096
SAVING = 8  # how many times shorter than the matrix the vector must be


def product(x: Tensor, y: Tensor) -> Tensor:
    """numpy's matmul. A matrix that lies in memory as a short vector (``h[i, j] = line[a i + b j]``, Hankel but
    for its steps) multiplies in N log N: recognition puts such matrices in place of large weights."""
    if hankel(y) and x.ndim >= 2:
        return _times_hankel(x, y)
    if hankel(x) and y.ndim >= 2:
        return _times_hankel(y.transpose(-1, -2), x.T).transpose(-1, -2)
    return torch.matmul(x, y)


def hankel(matrix: Tensor) -> bool:
    """Whether a matrix is large and lies in memory as a vector much shorter than itself."""
    return matrix.ndim == 2 and matrix.numel() >= SMALLEST_HANKEL and SAVING * _line(matrix) <= matrix.numel()


def _line(matrix: Tensor) -> int:
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return down * (rows - 1) + across * (columns - 1) + 1


def _times_hankel(x: Tensor, hankel_CN: Tensor) -> Tensor:
    """The correlation of every row of x with the vector behind the matrix."""
    (rows, columns), (down, across) = hankel_CN.shape, hankel_CN.stride()
    line = hankel_CN.as_strided((_line(hankel_CN),), (1,))
    length = scipy.fft.next_fast_len(len(line), real=True)
    if down > 1:
        spread = x.new_zeros((*x.shape[:-1], down * (rows - 1) + 1))
        spread[..., ::down] = x
        x = spread
    spectrum = torch.fft.rfft(x, length).conj() * torch.fft.rfft(line, length)
    return torch.fft.irfft(spectrum, length)[..., : across * (columns - 1) + 1 : across]


@operator("MatMul")
def matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """numpy's matmul."""
    return product(x, y)


@operator("Gemm")
def gemm(call: Call, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
    """``alpha * x @ y + beta * c`` with optional transposes."""
    x, y = (x.T if call.get("transA") else x), (y.T if call.get("transB") else y)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    result = product(x, y)
    result = result if alpha == 1.0 else (alpha * result).to(result.dtype)
    if c is None or beta == 0.0:
        return result
    return result + (c if beta == 1.0 else (beta * c).to(c.dtype))


@operator("Einsum")
def einsum(call: Call, *tensors: Tensor) -> Tensor:
    """Einstein summation."""
    return torch.einsum(call.need("equation").replace(" ", ""), *tensors)


@operator("Det")
def determinant(call: Call, x: Tensor) -> Tensor:
    """Determinants of the last two axes."""
    return torch.linalg.det(x)
