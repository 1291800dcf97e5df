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
    """Layer norm of a sum; further outputs are its mean, one over its deviation, and the sum itself."""
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.get("epsilon", 1e-12)
    result = functional.layer_norm(total, total.shape[-1:], gain, beta, epsilon)
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    return result, mean, (variance + epsilon).rsqrt(), total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_rms_norm(call: Call, x: Tensor, skip: Tensor, gain: Tensor, bias: Tensor | None = None) -> Result:
    """RMS norm of a sum; further outputs are a mean nobody computes, one over the root, and the sum itself."""
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.get("epsilon", 1e-12)
    root = (total.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return rms(total, [-1], epsilon) * gain, torch.zeros_like(root), root, total


@operator("SimplifiedLayerNormalization", domain=DOMAIN)
@operator("SimplifiedLayerNormalization")
def simplified_layer_norm(call: Call, x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm; ONNX Runtime writes it in the standard domain too."""
    axis = call.get("axis", -1) % x.ndim
    return rms(x, list(range(axis, x.ndim)), call.get("epsilon", 1e-5)) * gain


@operator("FusedMatMul", domain=DOMAIN)
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """``alpha * A B`` with optional transposes; with `transBatch` rows come first, before the batch axes."""
    a = a.movedim(0, -2) if call.get("transBatchA") else a
    b = b.movedim(0, -2) if call.get("transBatchB") else b
    a = a.transpose(-1, -2) if call.get("transA") else a
    b = b.transpose(-1, -2) if call.get("transB") else b
    return call.get("alpha", 1.0) * (a @ b)
