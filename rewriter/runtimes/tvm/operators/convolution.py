"""Convolutions and pools over one to three axes."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op
_CONV = {1: op.nn.conv1d, 2: op.nn.conv2d, 3: op.nn.conv3d}
_TRANSPOSED = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}
_POOLS = {
    "MaxPool": {1: op.nn.max_pool1d, 2: op.nn.max_pool2d, 3: op.nn.max_pool3d},
    "AveragePool": {1: op.nn.avg_pool1d, 2: op.nn.avg_pool2d, 3: op.nn.avg_pool3d},
}


@lowers("Conv")
def _conv(lowering: Lowering, node: Node) -> Any:
    kernel = lowering.shape(node.inputs[1])[2:]
    axes = len(kernel)
    if axes not in _CONV:
        raise lowering.unsupported(node, f"over {axes} axes")
    form = {**_steps(lowering, node, kernel), "groups": int(node.attributes.get("group", 1))}
    x, weight = (lowering.value(name) for name in node.inputs[:2])
    return _with_bias(lowering, node, lowering.builder.emit(_CONV[axes](x, weight, **form)), axes)


@lowers("ConvTranspose")
def _conv_transpose(lowering: Lowering, node: Node) -> Any:
    kernel = lowering.shape(node.inputs[1])[2:]
    axes, ones = len(kernel), [1] * len(kernel)
    given = node.attributes.get("auto_pad", "NOTSET")
    if axes not in _TRANSPOSED or "output_shape" in node.attributes or given not in ("NOTSET", "VALID"):
        raise lowering.unsupported(node, "other than one or two axes with explicit padding")
    form = {
        "strides": integers(node.attributes.get("strides", ones)),
        "padding": integers(node.attributes.get("pads", [0] * 2 * axes)),
        "output_padding": integers(node.attributes.get("output_padding", [0] * axes)),
        "dilation": integers(node.attributes.get("dilations", ones)),
        "groups": int(node.attributes.get("group", 1)),
    }
    x, weight = (lowering.value(name) for name in node.inputs[:2])
    return _with_bias(lowering, node, lowering.builder.emit(_TRANSPOSED[axes](x, weight, **form)), axes)


def _with_bias(lowering: Lowering, node: Node, result: Any, axes: int) -> Any:
    if not node.input(2):
        return result
    row = op.reshape(lowering.value(node.inputs[2]), (1, lowering.shape(node.inputs[2])[0], *[1] * axes))
    return op.add(result, row)


@lowers("MaxPool", "AveragePool")
def _pool(lowering: Lowering, node: Node) -> Any:
    kernel = tuple(integers(node.attributes["kernel_shape"]))
    if len(kernel) not in _POOLS[node.op] or lowering.wants(node, 1):
        raise lowering.unsupported(node, "over more than three axes, or with indices")
    form: dict[str, Any] = {**_steps(lowering, node, kernel), "ceil_mode": bool(node.attributes.get("ceil_mode", 0))}
    if node.op == "AveragePool":
        form["count_include_pad"] = bool(node.attributes.get("count_include_pad", 0))
    return _POOLS[node.op][len(kernel)](lowering.value(node.inputs[0]), kernel, **form)


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(lowering: Lowering, node: Node) -> Any:
    reduce = op.mean if node.op == "GlobalAveragePool" else op.max
    return reduce(lowering.value(node.inputs[0]), list(range(2, len(lowering.shape(node.inputs[0])))), True)


def _steps(lowering: Lowering, node: Node, kernel: tuple[int, ...]) -> dict[str, list[int]]:
    """Strides, padding (all begins, then all ends) and dilation."""
    ones = [1] * len(kernel)
    strides = integers(node.attributes.get("strides", ones))
    dilation = integers(node.attributes.get("dilations", ones))
    given = str(node.attributes.get("auto_pad", "NOTSET"))
    padding = integers(node.attributes.get("pads", [0] * 2 * len(kernel)))
    if given == "VALID":
        padding = [0] * 2 * len(kernel)
    elif given.startswith("SAME"):
        sizes = lowering.shape(node.inputs[0])[2:]
        needs = [
            max((-(-size // step) - 1) * step + (width - 1) * apart + 1 - size, 0)
            for size, step, width, apart in zip(sizes, strides, kernel, dilation, strict=True)
        ]
        small, large = [need // 2 for need in needs], [need - need // 2 for need in needs]
        padding = [*small, *large] if given == "SAME_UPPER" else [*large, *small]
    return {"strides": strides, "padding": padding, "dilation": dilation}
