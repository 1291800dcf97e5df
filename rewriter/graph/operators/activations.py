"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, operator

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "HardSwish": functional.hardswish,
    "Mish": functional.mish,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": functional.softsign,
}


def _register(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @operator(name)
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)


for _name, _function in _PLAIN.items():
    _register(_name, _function)


@operator("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    """Gaussian error linear unit, exact or by tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return functional.gelu(x, approximate=call.get("approximate") or "none")


@operator("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@operator("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    """Exponential below zero."""
    return functional.elu(x, call.get("alpha", 1.0))


@operator("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    """Continuously differentiable Elu."""
    return functional.celu(x, call.get("alpha", 1.0))


@operator("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    """Scaled Elu; the defaults are the standard's."""
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    """A slope below zero."""
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@operator("PRelu")
def p_relu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """A learned slope below zero."""
    return torch.where(x < 0, slope * x, x)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    """Zero up to a threshold."""
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """A clipped line."""
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0.0, 1.0)


@operator("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    """Zero within a band, shifted outside."""
    bias, limit = call.get("bias", 0.0), call.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("Softmax", since=13)
def softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.softmax(x, call.get("axis", -1))


@operator("LogSoftmax", since=13)
def log_softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.log_softmax(x, call.get("axis", -1))


@operator("Hardmax", since=13)
def hardmax(call: Call, x: Tensor) -> Tensor:
    """One at the first maximum along one axis."""
    return _hardmax(x, call.get("axis", -1))


@operator("Softmax")
def softmax_flat(call: Call, x: Tensor) -> Tensor:
    """Over all axes from `axis` on, before opset 13."""
    return _flat(call, x, lambda flat: torch.softmax(flat, 1))


@operator("LogSoftmax")
def log_softmax_flat(call: Call, x: Tensor) -> Tensor:
    """Over all axes from `axis` on, before opset 13."""
    return _flat(call, x, lambda flat: torch.log_softmax(flat, 1))


@operator("Hardmax")
def hardmax_flat(call: Call, x: Tensor) -> Tensor:
    """Over all axes from `axis` on, before opset 13."""
    return _flat(call, x, lambda flat: _hardmax(flat, 1))


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def _flat(call: Call, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    rows = x.shape[:axis].numel()
    return function(x.reshape(rows, -1)).reshape(x.shape)


@operator("SwiGLU")
def swish_gate(call: Call, gate: Tensor, x: Tensor) -> Tensor:
    """``swish(gate) * x`` (Shazeer, arXiv 2002.05202)."""
    return gate * torch.sigmoid(call.get("alpha", 1.0) * gate) * x
