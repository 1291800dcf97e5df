"""Activations and other functions of one number that no template serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import TABLE, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
_SELU = (1.67326319217681884765625, 1.05070102214813232421875)

_UNARY: dict[str, Callable[[Any], Any]] = {
    "Acos": op.acos, "Acosh": op.acosh, "Asin": op.asin, "Asinh": op.asinh, "Atanh": op.atanh,
    "Softsign": lambda x: op.divide(x, op.add(op.abs(x), _of(1.0, x))),
    "Mish": lambda x: op.multiply(x, op.tanh(op.log(op.add(op.exp(x), _of(1.0, x))))),
    "HardSwish": lambda x: op.multiply(x, _clipped(op.add(op.multiply(x, _of(1 / 6, x)), _of(0.5, x)), x)),
}  # fmt: skip


def _of(value: float, x: Any) -> Any:
    return relax.const(value, str(x.ty.dtype))


def _clipped(line: Any, x: Any) -> Any:
    return op.minimum(op.maximum(line, _of(0.0, x)), _of(1.0, x))


def _unary(lowering: Lowering, node: Node) -> Any:
    return _UNARY[node.op](lowering.value(node.inputs[0]))


for _name in _UNARY:
    TABLE[_name] = _unary


def _below(x: Any, alpha: float, inner: float = 1.0) -> Any:
    """``alpha * (exp(x / inner) - 1)`` where x is negative, else 0; exp sees no large number."""
    low = op.minimum(x, _of(0.0, x))
    return op.multiply(_of(alpha, x), op.subtract(op.exp(op.divide(low, _of(inner, x))), _of(1.0, x)))


@lowers("Elu", "Celu", "Selu")
def _elu(lowering: Lowering, node: Node) -> Any:
    x = lowering.value(node.inputs[0])
    alpha = float(node.attributes.get("alpha", _SELU[0] if node.op == "Selu" else 1.0))
    result = op.add(op.maximum(x, _of(0.0, x)), _below(x, alpha, alpha if node.op == "Celu" else 1.0))
    if node.op == "Selu":
        return op.multiply(_of(float(node.attributes.get("gamma", _SELU[1])), x), result)
    return result


@lowers("ThresholdedRelu")
def _thresholded(lowering: Lowering, node: Node) -> Any:
    x = lowering.value(node.inputs[0])
    return op.where(op.greater(x, _of(float(node.attributes.get("alpha", 1.0)), x)), x, _of(0.0, x))


@lowers("PRelu")
def _prelu(lowering: Lowering, node: Node) -> Any:
    x, slope = (lowering.value(name) for name in node.inputs)
    return op.where(op.less(x, _of(0.0, x)), op.multiply(x, slope), x)


@lowers("Shrink")
def _shrink(lowering: Lowering, node: Node) -> Any:
    x = lowering.value(node.inputs[0])
    bias, limit = float(node.attributes.get("bias", 0.0)), float(node.attributes.get("lambd", 0.5))
    low = op.where(op.less(x, _of(-limit, x)), op.add(x, _of(bias, x)), _of(0.0, x))
    return op.where(op.greater(x, _of(limit, x)), op.subtract(x, _of(bias, x)), low)


@lowers("Mean")
def _mean(lowering: Lowering, node: Node) -> Any:
    total = lowering.value(node.inputs[0])
    for name in node.inputs[1:]:
        total = lowering.builder.emit(op.add(total, lowering.value(name)))
    return op.divide(total, relax.const(float(len(node.inputs)), lowering.dtype(node.inputs[0])))
