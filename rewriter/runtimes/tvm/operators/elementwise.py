"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.kernels.maps import Map, make_map
from rewriter.runtimes.tvm.lowering import Lowering, by_template, is_float32
from rewriter.runtimes.tvm.operators.registry import TABLE, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
MAP_FROM_ELEMENTS = 64  # below, a call costs more than the vectors save

_UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": op.abs, "Ceil": op.ceil, "Floor": op.floor, "Round": op.round, "Neg": op.negative, "Sqrt": op.sqrt,
    "Log": op.log, "Sin": op.sin, "Cos": op.cos, "Sign": op.sign, "IsNaN": op.isnan, "IsInf": op.isinf,
    "Not": op.logical_not, "BitwiseNot": op.bitwise_not, "Erf": op.erf, "Exp": op.exp, "Tanh": op.tanh,
    "Sigmoid": op.sigmoid, "Relu": op.nn.relu, "Tan": op.tan, "Atan": op.atan, "Sinh": op.sinh, "Cosh": op.cosh,
    "Reciprocal": lambda x: op.divide(_like(1.0, x), x),
    "Softplus": lambda x: op.log(op.add(op.exp(x), _like(1.0, x))),
    "Identity": lambda x: x,
}  # fmt: skip
_MAPPED = {"Erf": "erf", "Exp": "exp", "Tanh": "tanh", "Sigmoid": "sigmoid"}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": op.add, "Sub": op.subtract, "Mul": op.multiply, "Equal": op.equal, "Less": op.less,
    "LessOrEqual": op.less_equal, "Greater": op.greater, "GreaterOrEqual": op.greater_equal, "And": op.logical_and,
    "Or": op.logical_or, "Xor": op.logical_xor, "BitwiseAnd": op.bitwise_and, "BitwiseOr": op.bitwise_or,
    "BitwiseXor": op.bitwise_xor,
}  # fmt: skip
_PLAIN_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": op.nn.gelu, "gelu_tanh": op.nn.gelu_tanh, "silu": op.nn.silu, "relu": op.nn.relu, "tanh": op.tanh,
    "quick_gelu": lambda x: op.multiply(x, op.sigmoid(op.multiply(x, _like(1.702, x)))),
}  # fmt: skip
_VARIADIC = {"Max": op.maximum, "Min": op.minimum, "Sum": op.add}


def _like(value: float, x: Any) -> Any:
    return relax.const(value, str(x.ty.dtype))


def _unary(lowering: Lowering, node: Node) -> Any:
    x, mapped = node.inputs[0], _MAPPED.get(node.op)
    if mapped and by_template(lowering, x) and prod(lowering.shape(x)) >= MAP_FROM_ELEMENTS:
        return mapped_call(lowering, x, mapped)
    return _UNARY[node.op](lowering.value(x))


def mapped_call(lowering: Lowering, name: str, function: str) -> Any:
    """A call of the vector template for one function of one value."""
    spec = Map(lowering.shape(name), function, lowering.lanes)
    kernel = lowering.kernels.get(function, spec, lambda unique: make_map(spec, unique))
    return lowering.call(kernel, [lowering.value(name)], (spec.shape, "float32"))


for _name in _UNARY:
    TABLE[_name] = _unary


def _binary(lowering: Lowering, node: Node) -> Any:
    return _BINARY[node.op](lowering.value(node.inputs[0]), lowering.value(node.inputs[1]))


for _name in _BINARY:
    TABLE[_name] = _binary


def _variadic(lowering: Lowering, node: Node) -> Any:
    result = lowering.value(node.inputs[0])
    for name in node.inputs[1:]:
        result = lowering.builder.emit(_VARIADIC[node.op](result, lowering.value(name)))
    return result


for _name in _VARIADIC:
    TABLE[_name] = _variadic


@lowers("Pow")
def _power(lowering: Lowering, node: Node) -> Any:
    x, exponent = lowering.value(node.inputs[0]), lowering.program.constant(node.inputs[1])
    if (
        exponent is not None
        and exponent.size == 1
        and lowering.shape(node.inputs[0]) == lowering.shape(node.outputs[0])
    ):
        value = float(exponent.reshape(-1)[0])
        if value == 2.0:
            return op.multiply(x, x)
        if value == 3.0:
            return op.multiply(op.multiply(x, x), x)
        if value == 0.5:
            return op.sqrt(x)
    dtype = lowering.dtype(node.inputs[0])
    return op.power(x, op.astype(lowering.value(node.inputs[1]), dtype))


@lowers("Div")
def _divide(lowering: Lowering, node: Node) -> Any:
    a, b = (lowering.value(name) for name in node.inputs)
    if lowering.program.dtype(node.inputs[0]).kind == "f":
        return op.divide(a, b)
    # ONNX truncates whole-number division, Relax floors: divide magnitudes, then give the quotient its sign.
    quotient = op.floor_divide(op.abs(a), op.abs(b))
    return op.multiply(quotient, op.multiply(op.sign(a), op.sign(b)))


@lowers("Mod")
def _modulo(lowering: Lowering, node: Node) -> Any:
    if node.attributes.get("fmod", 0):
        raise lowering.unsupported(node, "fmod=1")
    return op.floor_mod(*(lowering.value(name) for name in node.inputs))


@lowers("Where")
def _where(lowering: Lowering, node: Node) -> Any:
    return op.where(*(lowering.value(name) for name in node.inputs))


@lowers("Cast", "CastLike")
def _cast(lowering: Lowering, node: Node) -> Any:
    source, target = lowering.program.dtype(node.inputs[0]), lowering.dtype(node.outputs[0])
    x = lowering.value(node.inputs[0])
    if target == "bool" and source.kind != "b":
        return op.not_equal(x, relax.const(0, str(source)))
    return op.astype(x, target)


@lowers("Clip")
def _clip(lowering: Lowering, node: Node) -> Any:
    x, dtype = lowering.value(node.inputs[0]), lowering.dtype(node.inputs[0])
    for index, name, choose in ((1, "min", op.maximum), (2, "max", op.minimum)):
        if node.input(index):
            x = lowering.builder.emit(choose(x, lowering.value(node.input(index))))
        elif name in node.attributes:
            x = lowering.builder.emit(choose(x, relax.const(node.attributes[name], dtype)))
    return x


@lowers("Gelu")
def _gelu(lowering: Lowering, node: Node) -> Any:
    approximate = node.attributes.get("approximate", "none") == "tanh"
    return activation_of(lowering, node, node.inputs[0], "gelu_tanh" if approximate else "gelu")


@lowers("QuickGelu", "com.microsoft:QuickGelu", "com.microsoft:Gelu", "Swish")
def _named_activation(lowering: Lowering, node: Node) -> Any:
    names = {"Gelu": "gelu", "Swish": "silu", "QuickGelu": "quick_gelu"}
    if abs(float(node.attributes.get("alpha", 1.702 if node.op == "QuickGelu" else 1.0)) - 1.702) > 1e-6:
        if node.op == "QuickGelu":
            raise lowering.unsupported(node, "alpha other than 1.702")
        if node.op == "Swish" and float(node.attributes.get("alpha", 1.0)) != 1.0:
            raise lowering.unsupported(node, "alpha other than 1")
    return activation_of(lowering, node, node.inputs[0], names[node.op])


def activation_of(lowering: Lowering, node: Node, name: str, function: str) -> Any:
    """A named activation of one value."""
    if not is_float32(lowering, name):
        raise lowering.unsupported(node, f"dtype {lowering.dtype(name)}")
    if not by_template(lowering, name):
        return _PLAIN_ACTIVATIONS[function](lowering.value(name))
    return mapped_call(lowering, name, function)


@lowers("LeakyRelu")
def _leaky_relu(lowering: Lowering, node: Node) -> Any:
    return op.nn.leakyrelu(lowering.value(node.inputs[0]), float(node.attributes.get("alpha", 0.01)))


@lowers("HardSigmoid")
def _hard_sigmoid(lowering: Lowering, node: Node) -> Any:
    x = lowering.value(node.inputs[0])
    alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    line = op.add(op.multiply(x, _like(alpha, x)), _like(beta, x))
    return op.minimum(op.maximum(line, _like(0.0, x)), _like(1.0, x))


@lowers("Dropout")
def _dropout(lowering: Lowering, node: Node) -> Any:
    training = lowering.constant(node, 2)
    if training is not None and bool(np.asarray(training).reshape(-1)[0]):
        raise lowering.unsupported(node, "training mode")
    return lowering.value(node.inputs[0])
