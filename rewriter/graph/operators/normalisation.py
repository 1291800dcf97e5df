"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, Result, operator


@operator("LayerNormalization")
def layer_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Result:
    """Over all axes from `axis` on (Ba et al., arXiv 1607.06450); also mean and inverse deviation on request."""
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    axes = list(range(axis, x.ndim))
    if gain.shape == x.shape[axis:] and (bias is None or bias.shape == gain.shape):
        result = functional.layer_norm(x, x.shape[axis:], gain, bias, epsilon)
    else:
        result = functional.layer_norm(x, x.shape[axis:], None, None, epsilon) * gain
        result = result if bias is None else result + bias
    if not call.wants(1) and not call.wants(2):
        return result
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return result, mean, torch.rsqrt(variance + epsilon)


@operator("RMSNormalization")
def rms_norm(call: Call, x: Tensor, gain: Tensor) -> Tensor:
    """By the root mean square over all axes from `axis` on (Zhang and Sennrich, arXiv 1910.07467)."""
    axis = call.get("axis", -1) % x.ndim
    return rms(x, list(range(axis, x.ndim)), call.get("epsilon", 1e-5)) * gain


def rms(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """`x` divided by its root mean square; half precision is computed in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)).to(x.dtype)


@operator("BatchNormalization")
def batch_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """With recorded statistics; refused while training."""
    if call.get("training_mode") or (call.opset < 7 and not call.get("is_test", 0)):
        raise call.unsupported("it is in training mode: export the model after model.eval()")
    return functional.batch_norm(x, mean, variance, gain, bias, False, 0.0, call.get("epsilon", 1e-5))


@operator("GroupNormalization", since=21)
def group_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Over groups of channels, gain and bias per channel (Wu and He, arXiv 1803.08494)."""
    return functional.group_norm(x, call.need("num_groups"), gain, bias, call.get("epsilon", 1e-5))


@operator("GroupNormalization", since=18)
def group_norm_by_group(call: Call, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Gain and bias per group, before opset 21."""
    groups = call.need("num_groups")
    repeat = x.shape[1] // groups
    gain, bias = gain.repeat_interleave(repeat), bias.repeat_interleave(repeat)
    return functional.group_norm(x, groups, gain, bias, call.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(call: Call, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Over the space of each channel of each item."""
    variance, mean = torch.var_mean(x, list(range(2, x.ndim)), correction=0, keepdim=True)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (x - mean) * torch.rsqrt(variance + call.get("epsilon", 1e-5)) * gain.view(shape) + bias.view(shape)


@operator("LpNormalization")
def lp_normalisation(call: Call, x: Tensor) -> Tensor:
    """By the sum of magnitudes or the Euclidean length along one axis; zero stays zero."""
    length = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


@operator("MeanVarianceNormalization")
def mean_variance_normalisation(call: Call, x: Tensor) -> Tensor:
    """Zero mean and unit variance over the given axes."""
    variance, mean = torch.var_mean(x, call.get("axes") or [0, 2, 3], correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


@operator("LRN")
def local_response(call: Call, x: Tensor) -> Tensor:
    """By the sum of squares of neighbouring channels (Krizhevsky et al. 2012)."""
    size, channels = call.need("size"), x.shape[1]
    low = (size - 1) // 2
    squares = functional.pad((x * x).flatten(2).transpose(1, 2), (low, size - 1 - low)).unfold(-1, size, 1).sum(-1)
    total = squares[..., :channels].transpose(1, 2).reshape(x.shape)
    scale = call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * total
    return x / scale.pow(call.get("beta", 0.75))
