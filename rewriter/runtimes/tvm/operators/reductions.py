"""Reductions, softmax, norms over the last axes and generic products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

from tvm import relax

from rewriter.runtimes.tvm.kernels.matmul import MatMul, make_matmul
from rewriter.runtimes.tvm.kernels.norm import Norm, make_norm
from rewriter.runtimes.tvm.kernels.softmax import Softmax, make_softmax
from rewriter.runtimes.tvm.lowering import Lowering, by_template
from rewriter.runtimes.tvm.operators.registry import TABLE, integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op

_REDUCE: dict[str, Callable[[Any, Any, bool], Any]] = {
    "ReduceSum": op.sum, "ReduceMean": op.mean, "ReduceMax": op.max, "ReduceMin": op.min, "ReduceProd": op.prod,
    "ReduceSumSquare": lambda x, axes, keep: op.sum(op.multiply(x, x), axes, keep),
    "ReduceL2": lambda x, axes, keep: op.sqrt(op.sum(op.multiply(x, x), axes, keep)),
    "ReduceL1": lambda x, axes, keep: op.sum(op.abs(x), axes, keep),
    "ReduceLogSum": lambda x, axes, keep: op.log(op.sum(x, axes, keep)),
    "ReduceLogSumExp": lambda x, axes, keep: _log_sum_exp(x, axes, keep),
}  # fmt: skip


def _log_sum_exp(x: Any, axes: Any, keep: bool) -> Any:
    """Without overflow: the largest number is taken out first."""
    top = op.max(x, axes, True)
    total = op.log(op.sum(op.exp(op.subtract(x, top)), axes, keep))
    return op.add(total, top if keep else op.max(x, axes, False))


def _reduce(lowering: Lowering, node: Node) -> Any:
    given = lowering.constant(node, 1)
    axes = integers(given) if given is not None else node.attributes.get("axes")
    x = lowering.value(node.inputs[0])
    if not axes and int(node.attributes.get("noop_with_empty_axes", 0)):
        return x
    chosen = integers(axes) if axes else None
    return _REDUCE[node.op](x, chosen, bool(node.attributes.get("keepdims", 1)))


for _name in _REDUCE:
    TABLE[_name] = _reduce


@lowers("ArgMax", "ArgMin")
def _arg(lowering: Lowering, node: Node) -> Any:
    if int(node.attributes.get("select_last_index", 0)):
        raise lowering.unsupported(node, "select_last_index=1")
    choose = op.argmax if node.op == "ArgMax" else op.argmin
    axis, keep = int(node.attributes.get("axis", 0)), bool(node.attributes.get("keepdims", 1))
    return choose(lowering.value(node.inputs[0]), axis, keep)


@lowers("CumSum")
def _cumsum(lowering: Lowering, node: Node) -> Any:
    given = lowering.constant(node, 1)
    assert given is not None
    axis, backwards = int(given.reshape(-1)[0]), bool(node.attributes.get("reverse", 0))
    exclusive = bool(node.attributes.get("exclusive", 0))
    x = lowering.value(node.inputs[0])
    x = lowering.builder.emit(op.flip(x, axis)) if backwards else x
    total = op.cumsum(x, axis, lowering.dtype(node.outputs[0]), exclusive)
    return op.flip(lowering.builder.emit(total), axis) if backwards else total


@lowers("Softmax", "LogSoftmax")
def _softmax(lowering: Lowering, node: Node) -> Any:
    shape = lowering.shape(node.inputs[0])
    axis = int(node.attributes.get("axis", -1 if node.opset >= 13 else 1))
    function = op.nn.softmax if node.op == "Softmax" else op.nn.log_softmax
    x = lowering.value(node.inputs[0])
    if axis % len(shape) == len(shape) - 1 and node.op == "Softmax" and by_template(lowering, node.inputs[0]):
        spec = Softmax(shape, lowering.lanes, lowering.threads)
        kernel = lowering.kernels.get("softmax", spec, lambda unique: make_softmax(spec, unique))
        return lowering.call(kernel, [x], (shape, "float32"))
    if node.opset >= 13 or axis % len(shape) == len(shape) - 1:
        return function(x, axis)
    rows = 1
    for size in shape[: axis % len(shape)]:
        rows *= size
    return op.reshape(function(op.reshape(x, (rows, -1)), -1), shape)


@lowers(
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "com.microsoft:SimplifiedLayerNormalization",
)
def _norm(lowering: Lowering, node: Node) -> Any:
    shape = lowering.shape(node.inputs[0])
    axis = int(node.attributes.get("axis", -1)) % len(shape)
    if lowering.wants(node, 1, 2):
        raise lowering.unsupported(node, "outputs beyond the first")
    kind = "layer" if node.op == "LayerNormalization" else "rms"
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    if axis == len(shape) - 1 and by_template(lowering, node.inputs[0]):
        return norm_call(lowering, kind, epsilon, node.inputs[0], "", node.inputs[1], node.input(2))
    gain, axes = lowering.value(node.inputs[1]), list(range(axis, len(shape)))
    if kind == "rms":
        return op.nn.rms_norm(lowering.value(node.inputs[0]), gain, axes, epsilon)
    bias = lowering.value(node.input(2)) if node.input(2) else op.zeros_like(gain)
    return op.nn.layer_norm(lowering.value(node.inputs[0]), gain, bias, axes, epsilon)


def norm_call(
    lowering: Lowering, kind: Any, epsilon: float, x: str, residual: str, gain: str, bias: str, keep_sum: bool = False
) -> Any:
    """A call of the norm template over the last axis; with `keep_sum` a list of (normalised, sum)."""
    shape = lowering.shape(x)
    spec = Norm(shape, epsilon, kind, bool(bias), bool(residual), keep_sum, lowering.lanes, lowering.threads)
    kernel = lowering.kernels.get("norm", spec, lambda unique: make_norm(spec, unique))
    inputs = [lowering.value(name) for name in (x, residual) if name]
    for name in (gain, bias):
        if name:
            inputs.append(_channels(lowering, name, shape[-1]))
    outputs = [(shape, "float32")] * (2 if keep_sum else 1)
    result = lowering.builder.emit(lowering.call(kernel, inputs, *outputs))
    return [relax.TupleGetItem(result, 0), relax.TupleGetItem(result, 1)] if keep_sum else result


def _channels(lowering: Lowering, name: str, channels: int) -> Any:
    value = lowering.value(name)
    if lowering.shape(name) == (channels,):
        return value
    return lowering.builder.emit(op.broadcast_to(op.reshape(value, lowering.shape(name)[-1:] or (1,)), (channels,)))


@lowers("rewriter:Norm")
def _fused_norm(lowering: Lowering, node: Node) -> Any:
    attributes = node.attributes
    x, residual, gain, bias = (node.input(index) for index in range(4))
    keep = len(node.outputs) > 1
    return norm_call(lowering, attributes["kind"], float(attributes["epsilon"]), x, residual, gain, bias, keep)


@lowers("MatMul")
def _matmul(lowering: Lowering, node: Node) -> Any:
    left, right = node.inputs[:2]
    a, b = lowering.shape(left), lowering.shape(right)
    plain = len(a) >= 2 and len(b) >= 2 and by_template(lowering, left) and (len(b) == 2 or a[:-2] == b[:-2])
    if not plain:
        return op.matmul(*(lowering.value(name) for name in node.inputs[:2]))
    spec = MatMul(a[:-2], a[-2], b[-1], a[-1], len(b) == 2, lowering.lanes, lowering.threads)
    tile = lowering.tiles.matmul(spec)
    kernel = lowering.kernels.get("matmul", (spec, tile), lambda unique: make_matmul(spec, tile, unique))
    return lowering.call(kernel, [lowering.value(left), lowering.value(right)], ((*a[:-1], b[-1]), "float32"))


@lowers("Einsum")
def _einsum(lowering: Lowering, node: Node) -> Any:
    ranks = [len(lowering.shape(name)) for name in node.inputs]
    subscripts = spelled_out(str(node.attributes["equation"]), ranks, len(lowering.shape(node.outputs[0])))
    return op.einsum([lowering.value(name) for name in node.inputs], subscripts)


def spelled_out(equation: str, ranks: Sequence[int], rank: int) -> str:
    """An einsum's equation with a result, and with letters in place of ellipses."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    free = [letter for letter in ascii_letters if letter not in terms]
    if not arrow:
        letters = terms.replace(",", "").replace(".", "")
        once = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
        result = ("..." if "..." in terms else "") + once

    def written(part: str, axes: int) -> str:
        axes -= len(part.replace(".", ""))
        return part.replace("...", "".join(free[:axes][::-1]))

    spelled = [written(part, axes) for part, axes in zip(parts, ranks, strict=True)]
    return f"{','.join(spelled)}->{written(result, rank)}"


@lowers("Gemm")
def _gemm(lowering: Lowering, node: Node) -> Any:
    a, b = (lowering.value(name) for name in node.inputs[:2])
    a = op.permute_dims(a) if int(node.attributes.get("transA", 0)) else a
    b = op.permute_dims(b) if int(node.attributes.get("transB", 0)) else b
    result, dtype = op.matmul(a, b), lowering.dtype(node.inputs[0])
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    result = result if alpha == 1.0 else op.multiply(result, relax.const(alpha, dtype))
    if not node.input(2):
        return result
    c = lowering.value(node.inputs[2])
    return op.add(result, c if beta == 1.0 else op.multiply(c, relax.const(beta, dtype)))
