"""Element-wise arithmetic, comparison, logic and casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, operator
from rewriter.graph.tensors import torch_dtype

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _power,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_LEGACY_BROADCAST = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")


def _register_unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @operator(name)
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)


def _register_binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(name, since=7 if name in _LEGACY_BROADCAST else 1)
    def run(call: Call, x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)


def _register_legacy(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Before opset 7 the second operand was aligned at `axis`, not at the end."""

    @operator(name)
    def run(call: Call, x: Tensor, y: Tensor) -> Tensor:
        if call.get("broadcast") and call.get("axis") is not None:
            y = y.reshape([*y.shape, *[1] * (x.ndim - call.get("axis") - y.ndim)])
        return function(x, y)


for _name, _unary in _UNARY.items():
    _register_unary(_name, _unary)
for _name, _binary in _BINARY.items():
    _register_binary(_name, _binary)
for _name in _LEGACY_BROADCAST:
    _register_legacy(_name, _BINARY[_name])


@operator("Max")
def maximum(call: Call, *tensors: Tensor) -> Tensor:
    """Element-wise maximum of any number of tensors."""
    return reduce(torch.maximum, tensors)


@operator("Min")
def minimum(call: Call, *tensors: Tensor) -> Tensor:
    """Element-wise minimum of any number of tensors."""
    return reduce(torch.minimum, tensors)


@operator("Sum")
def total(call: Call, *tensors: Tensor) -> Tensor:
    """Element-wise sum of any number of tensors."""
    return reduce(torch.add, tensors)


@operator("Mean")
def mean(call: Call, *tensors: Tensor) -> Tensor:
    """Element-wise mean of any number of tensors."""
    return reduce(torch.add, tensors) / len(tensors)


@operator("Mod")
def modulo(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend with `fmod`."""
    return torch.fmod(x, y) if call.get("fmod") else torch.remainder(x, y)


@operator("BitShift")
def bit_shift(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Shift of unsigned integers."""
    shift = torch.bitwise_left_shift if call.need("direction") == "LEFT" else torch.bitwise_right_shift
    return shift(x, y)


@operator("Where")
def where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`x` where the condition holds, else `y`."""
    return torch.where(condition, x, y)


@operator("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    """Whether an element is infinite, of the signs asked for."""
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    found = torch.isposinf(x) if positive else torch.zeros_like(x, dtype=torch.bool)
    return found | torch.isneginf(x) if negative else found


@operator("Clip", since=11)
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bounds as inputs; the upper one wins where they cross."""
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@operator("Clip")
def clip_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Bounds as attributes, before opset 11."""
    return torch.clamp(x, call.get("min", -torch.inf), call.get("max", torch.inf))


@operator("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    """Conversion; float targets follow the interpreter's forced dtype."""
    kind = call.need("to")
    dtype = call.dtype(kind)
    if torch_dtype(kind).itemsize == 1 and dtype.is_floating_point and call.upcast is None:
        return _saturated(call, x, dtype)
    return x.to(dtype)


def _saturated(call: Call, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not call.get("saturate", 1):
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return torch.clamp(x.float(), -limit, limit).to(dtype)


@operator("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    """Conversion to the dtype of another tensor."""
    return x.to(like.dtype)
