"""The spellings of a product with a constant matrix: MatMul from either side, Gemm, 1x1 Conv, Einsum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.attention.trace import Trace, inputs_of
from rewriter.core.refusal import Refused
from rewriter.core.site import Array


@dataclass(frozen=True)
class Form:
    """``data @ weight_CN + bias_N`` over the last `contracted` axes of data, or over axis 1 if `channels_first`.

    `weight` and `bias` name the values; the weight's own matrix is (N, C) if `transposed`, and times `alpha`.
    """

    data: str
    weight: str
    weight_CN: Array
    bias: str = ""
    bias_N: Array | None = None
    transposed: bool = False
    alpha: float = 1.0
    contracted: int = 1
    channels_first: bool = False


def read_form(trace: Trace, node: ir.Node, position: int, weight: str) -> Form:
    """How a linear node with its data at input `position` multiplies; raises `Refused` for forms not mapped."""
    names = inputs_of(node)
    if node.op_type == "Gemm" and position == 0:
        return _gemm(trace, node, weight)
    if node.op_type == "MatMul" and position == 0:
        return Form(names[0], weight, only_matrix(trace.value(weight)))
    if node.op_type == "MatMul" and len(trace.shape(names[1])) == 3:
        return Form(names[1], weight, only_matrix(trace.value(weight)).T, transposed=True, channels_first=True)
    if node.op_type == "FusedMatMul":
        return _fused(trace, node, position, weight)
    if node.op_type == "Conv":
        return _pointwise(trace, node, weight)
    if node.op_type == "Einsum":
        return _einsum(trace, node, position, weight)
    raise Refused("linear-form", f"linear {node.op_type}", (node.name or "",))


def only_matrix(weight: Array) -> Array:
    """The two-dimensional matrix behind a weight; raises `Refused` if there is not just one."""
    if weight.ndim < 2:
        raise Refused("linear-form", "weight with fewer than two axes")
    flat = weight.reshape(-1, *weight.shape[-2:])
    # decomposed torch graphs expand one matrix over the batch
    if len(flat) > 1 and not (flat == flat[:1]).all():
        raise Refused("linear-form", "different weights along a leading axis")
    return flat[0]


def attribute(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute."""
    return float(node.attributes[name].value) if name in node.attributes else default


def _gemm(trace: Trace, node: ir.Node, name: str) -> Form:
    if attribute(node, "transA", 0):
        raise Refused("linear-form", "Gemm with transA")
    names, alpha, transposed = inputs_of(node), attribute(node, "alpha", 1.0), bool(attribute(node, "transB", 0))
    weight = only_matrix(trace.value(name))
    weight = weight.T if transposed else weight
    weight = weight if alpha == 1.0 else weight * alpha
    if len(names) < 3 or not names[2]:
        return Form(names[0], name, weight, transposed=transposed, alpha=alpha)
    if names[2] not in trace.fixed:
        raise Refused("linear-form", "Gemm with a computed bias")
    bias = trace.value(names[2]) * attribute(node, "beta", 1.0)
    if bias.size not in (1, weight.shape[1]):
        raise Refused("linear-form", "Gemm with a bias per row")
    bias_N = np.broadcast_to(bias.reshape(-1), (weight.shape[1],))
    return Form(names[0], name, weight, names[2], bias_N, transposed, alpha)


def _fused(trace: Trace, node: ir.Node, position: int, name: str) -> Form:
    """ONNX Runtime's product with a factor and transposed operands."""
    flags = {flag: bool(attribute(node, flag, 0)) for flag in ("transA", "transB", "transBatchA", "transBatchB")}
    if position or flags["transA"] or flags["transBatchA"] or flags["transBatchB"]:
        raise Refused("linear-form", "FusedMatMul with its data transposed", (node.name or "",))
    weight, alpha = only_matrix(trace.value(name)), attribute(node, "alpha", 1.0)
    weight = weight.T if flags["transB"] else weight
    weight = weight if alpha == 1.0 else weight * alpha
    return Form(inputs_of(node)[0], name, weight, transposed=flags["transB"], alpha=alpha)


def _pointwise(trace: Trace, node: ir.Node, name: str) -> Form:
    """A convolution that looks at one position at a time."""
    names, weight = inputs_of(node), trace.value(name)
    sizes, groups = weight.shape[2:], attribute(node, "group", 1)
    moved = [node.attributes[a].as_ints() for a in ("pads", "strides") if a in node.attributes]
    if groups != 1 or any(size != 1 for size in sizes) or any(set(m) - {0, 1} for m in moved):
        raise Refused("linear-form", "a convolution over several positions", (node.name or "",))
    if "pads" in node.attributes and any(node.attributes["pads"].as_ints()):
        raise Refused("linear-form", "a convolution with padding", (node.name or "",))
    bias = names[2] if len(names) > 2 else ""
    if bias and bias not in trace.fixed:
        raise Refused("linear-form", "a convolution with a computed bias", (node.name or "",))
    matrix = weight.reshape(weight.shape[:2]).T
    bias_N = trace.value(bias) if bias else None
    return Form(names[0], name, matrix, bias, bias_N, transposed=True, channels_first=True)


def _einsum(trace: Trace, node: ir.Node, position: int, name: str) -> Form:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    parts = terms.split(",")
    if not arrow or "." in equation or len(parts) != 2:
        raise Refused("linear-form", f"einsum {equation}")
    data, factor = parts[position], parts[1 - position]
    summed, fresh = [c for c in data if c not in result], [c for c in result if c not in data]
    rows = [c for c in data if c in result]
    plain = list(data) == rows + summed and list(result) == rows + fresh and sorted(factor) == sorted(summed + fresh)
    if not plain or not summed or not fresh:
        raise Refused("linear-form", f"einsum {equation}")
    weight = trace.value(name).transpose([factor.index(c) for c in summed + fresh])
    width = int(np.prod(weight.shape[: len(summed)]))
    return Form(inputs_of(node)[position], name, weight.reshape(width, -1), contracted=len(summed))
