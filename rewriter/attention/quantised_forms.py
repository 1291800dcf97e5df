"""What each quantised operator computes in floats, if nothing were rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewriter.core.site import Array
from rewriter.graph.operators.quantised import n_bits_weight
from rewriter.graph.tensors import to_numpy, to_torch

if TYPE_CHECKING:
    from rewriter.attention.dequantise import Floats

MICROSOFT = "com.microsoft"
VIEWS = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)


def numbers_of(levels: Array, scale: Array, zero: Array | None) -> Array:
    """``(levels - zero) * scale`` of a matrix, scale and zero point for the whole or for its columns."""
    centred = levels.astype(np.float32) - (0.0 if zero is None else zero.astype(np.float32))
    return np.asarray(centred * scale, np.float32)


def _attributes(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: node.attributes[name].value for name in names if name in node.attributes}


def _between(kind: str, *keep: str) -> Callable[[Floats, ir.Node], None]:
    """Operators of two values: a, its scale and zero point, b, its scale and zero point, those of the result."""

    def form(floats: Floats, node: ir.Node) -> None:
        sides = [floats.of(node, 0, 1, 2), floats.of(node, 3, 4, 5)]
        if all(side is not None for side in sides):
            result = floats.make(kind, sides, **_attributes(node, *keep))
            floats.twins[node.outputs[0]] = floats.clipped(result, node, 7)

    return form


def _of_one(kind: str, *keep: str) -> Callable[[Floats, ir.Node], None]:
    """Operators of one value: x, its scale and zero point, those of the result."""

    def form(floats: Floats, node: ir.Node) -> None:
        x = floats.of(node, 0, 1, 2)
        if x is not None:
            floats.twins[node.outputs[0]] = floats.make(kind, [x], **_attributes(node, *keep))

    return form


def _joined(floats: Floats, node: ir.Node) -> None:
    """QLinearConcat: scale and zero point of the result, then of every part with the part before them."""
    parts = [floats.of(node, i, i + 1, i + 2) for i in range(2, len(node.inputs), 3)]
    if all(part is not None for part in parts):
        floats.twins[node.outputs[0]] = floats.make("Concat", parts, **_attributes(node, "axis"))


def _chosen(floats: Floats, node: ir.Node) -> None:
    """QLinearWhere."""
    sides = [floats.of(node, 1, 2, 3), floats.of(node, 4, 5, 6)]
    if all(side is not None for side in sides):
        floats.twins[node.outputs[0]] = floats.make("Where", [node.inputs[0], *sides])


def _bias(floats: Floats, node: ir.Node, position: int, *factors: int) -> ir.Value | None:
    """An int32 bias whose unit is the product of the scales of what is multiplied."""
    value, levels = floats.input(node, position), floats.number(node, position)
    if value is None or levels is None:
        return None
    scale: Array = np.ones((), np.float32)
    for factor in factors:
        number = floats.number(node, factor)
        if number is None:
            return None
        scale = scale * number
    return floats.constant(f"{value.name}/float", levels * scale)


def _gemm(floats: Floats, node: ir.Node) -> None:
    """QGemm; its result is a float unless it has a scale."""
    a, b = floats.of(node, 0, 1, 2), floats.of(node, 3, 4, 5)
    if a is None or b is None:
        return
    inputs = [a, b]
    if floats.input(node, 6) is not None:
        bias = _bias(floats, node, 6, 1, 4)
        if bias is None:
            return
        inputs.append(bias)
    result = floats.make("Gemm", inputs, **_attributes(node, "transA", "transB", "alpha"))
    if floats.input(node, 7) is not None:
        floats.twins[node.outputs[0]] = floats.clipped(result, node, 8)
    else:
        floats.give(node.outputs[0], result)


def _convolution(floats: Floats, node: ir.Node) -> None:
    """QLinearConv, whose weight may have a scale for every channel of the result."""
    x, value = floats.of(node, 0, 1, 2), floats.input(node, 3)
    levels, scale, zero = (floats.number(node, i) for i in (3, 4, 5))
    if x is None or value is None or levels is None or scale is None:
        return
    across = (-1, *[1] * (levels.ndim - 1))
    spread = None if zero is None else zero.reshape(across)
    inputs = [x, floats.constant(f"{value.name}/float", numbers_of(levels, scale.reshape(across), spread))]
    if floats.input(node, 8) is not None:
        bias = _bias(floats, node, 8, 1, 4)
        if bias is None:
            return
        inputs.append(bias)
    keep = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    result = floats.make("Conv", inputs, **_attributes(node, *keep))
    floats.twins[node.outputs[0]] = floats.clipped(result, node, 7)


def _to_float(data: int, weight: tuple[int, int, int], bias: int) -> Callable[[Floats, ir.Node], None]:
    """Products that give floats: MatMulIntegerToFloat of a quantised value, DynamicQuantizeMatMul of a float."""

    def form(floats: Floats, node: ir.Node) -> None:
        x, levels = floats.input(node, data), floats.of(node, *weight)
        x = floats.twins.get(x, x) if x is not None else None
        rounded = node.op_type == "MatMulIntegerToFloat" and (x is None or x is floats.input(node, data))
        if x is None or levels is None or rounded:
            return
        added = floats.input(node, bias)
        result = floats.make("MatMul", [x, levels])
        floats.give(node.outputs[0], result if added is None else floats.make("Add", [result, added]))

    return form


def _few_bits(floats: Floats, node: ir.Node) -> None:
    """MatMulNBits: weights of 4 or 8 bits in blocks."""
    value, arrays = floats.input(node, 1), [floats.number(node, i) for i in (1, 2, 3)]
    if value is None or arrays[0] is None or arrays[1] is None or floats.input(node, 4) is not None:
        return
    packed, scales, zeros = (None if array is None else to_torch(array) for array in arrays)
    assert packed is not None
    assert scales is not None
    sizes = {name: int(node.attributes[name].as_int()) for name in ("N", "K", "block_size")}
    bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
    if bits not in (4, 8):
        return
    weight_NK = n_bits_weight(packed, scales, zeros, bits, sizes["block_size"], sizes["N"], sizes["K"])
    weight = floats.constant(f"{value.name}/float", to_numpy(weight_NK.T.contiguous()))
    result, bias = floats.make("MatMul", [node.inputs[0], weight]), floats.input(node, 5)
    floats.give(node.outputs[0], result if bias is None else floats.make("Add", [result, bias]))


def _attention(floats: Floats, node: ir.Node) -> None:
    """QAttention as Attention of com.microsoft."""
    x, value = floats.input(node, 0), floats.input(node, 1)
    levels, scale = floats.number(node, 1), floats.number(node, 4)
    x = None if x is None else floats.twins.get(x)
    if x is None or value is None or levels is None or scale is None:
        return
    weight = floats.constant(f"{value.name}/float", numbers_of(levels, scale, floats.number(node, 7)))
    keep = ("num_heads", "unidirectional", "scale", "mask_filter_value", "do_rotary")
    inputs = [x, weight, floats.input(node, 2), floats.input(node, 5), floats.input(node, 8)]
    floats.give(node.outputs[0], floats.make("Attention", inputs, MICROSOFT, **_attributes(node, *keep)))


FORMS: dict[tuple[str, str], Callable[[Floats, ir.Node], None]] = {
    ("", "QLinearMatMul"): _between("MatMul"),
    ("", "QLinearConv"): _convolution,
    (MICROSOFT, "QLinearAdd"): _between("Add"),
    (MICROSOFT, "QLinearMul"): _between("Mul"),
    (MICROSOFT, "QLinearSigmoid"): _of_one("Sigmoid"),
    (MICROSOFT, "QLinearLeakyRelu"): _of_one("LeakyRelu", "alpha"),
    (MICROSOFT, "QLinearSoftmax"): _of_one("Softmax", "axis"),
    (MICROSOFT, "QLinearGlobalAveragePool"): _of_one("GlobalAveragePool"),
    (MICROSOFT, "QLinearConcat"): _joined,
    (MICROSOFT, "QLinearWhere"): _chosen,
    (MICROSOFT, "QGemm"): _gemm,
    (MICROSOFT, "MatMulIntegerToFloat"): _to_float(0, (1, 3, 5), 6),
    (MICROSOFT, "DynamicQuantizeMatMul"): _to_float(0, (1, 2, 3), 4),
    (MICROSOFT, "MatMulNBits"): _few_bits,
    (MICROSOFT, "QAttention"): _attention,
}
