"""Operators of com.microsoft, as ONNX Runtime defines them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.normalisation import rms
from rewriter.graph.operators.registry import Call, Result, operator

DOMAIN = "com.microsoft"


@operator("Gelu", domain=DOMAIN)
def gelu(call: Call, x: Tensor) -> Tensor:
    """Exact Gelu."""
    return functional.gelu(x)


@operator("BiasGelu", domain=DOMAIN)
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """Exact Gelu of a sum."""
    return functional.gelu(x + bias)


@operator("FastGelu", domain=DOMAIN)
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh, of a sum."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=DOMAIN)
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@operator("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, gain: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> Result:
    """Layer norm of a sum; the sum itself is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    result = functional.layer_norm(total, total.shape[-1:], gain, beta, call.get("epsilon", 1e-12))
    return result, None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_rms_norm(call: Call, x: Tensor, skip: Tensor, gain: Tensor, bias: Tensor | None = None) -> Result:
    """RMS norm of a sum; the sum itself is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    return rms(total, [-1], call.get("epsilon", 1e-12)) * gain, None, None, total


@operator("SimplifiedLayerNormalization", domain=DOMAIN)
@operator("SimplifiedLayerNormalization")
def simplified_layer_norm(call: Call, x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm; ONNX Runtime writes it in the standard domain too."""
    axis = call.get("axis", -1) % x.ndim
    return rms(x, list(range(axis, x.ndim)), call.get("epsilon", 1e-5)) * gain


@operator("FusedMatMul", domain=DOMAIN)
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """``alpha * A B`` with optional transposes; `transBatch` moves the last batch axis behind the rows first."""
    a = a.movedim(-2, 0) if call.get("transBatchA") else a
    b = b.movedim(-2, 0) if call.get("transBatchB") else b
    a = a.transpose(-1, -2) if call.get("transA") else a
    b = b.transpose(-1, -2) if call.get("transB") else b
    return call.get("alpha", 1.0) * (a @ b)
