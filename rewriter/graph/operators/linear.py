"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, operator


@operator("MatMul")
def matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """numpy's matmul."""
    return torch.matmul(x, y)


@operator("Gemm")
def gemm(call: Call, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
    """``alpha * x @ y + beta * c`` with optional transposes."""
    x, y = (x.T if call.get("transA") else x), (y.T if call.get("transB") else y)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    result = x @ y
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
