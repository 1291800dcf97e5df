"""Linear layers in number formats, written out in standard ONNX.

int8 is exact to the meaning of the composite: levels of each token by its own largest magnitude, `MatMulInteger` on
unsigned bytes with zero point 128, levels of each column of the weight. (`DynamicQuantizeLinear`, the only dynamic
quantisation below opset 21, has one scale for a whole tensor: it is not what was measured.) bf16 rounds the weight
alone and multiplies in fp32: standard operators on bfloat16 run nowhere fast on processors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.onnx import constant_of
from rewriter.runtimes.emitter import Emitter

LEVELS, ZERO_POINT, TINY = 127.0, 128, 1e-30


def rounded_product(e: Emitter, x: ir.Value, weight_CN: ir.Value, precision: str, dtype: np.dtype[Any]) -> ir.Value:
    """``x @ weight`` with operands rounded to bf16 or int8; x and the result are of `dtype`."""
    weight = constant_of(weight_CN)
    if weight is None:
        label = e.node.name or ""
        raise UnsupportedOperator("the standard form", f"Linear of precision {precision}", label, "a computed weight")
    if precision == "bf16":
        return e.op("MatMul", x, e.constant(_bfloat16(weight).astype(dtype)))
    narrow = dtype != np.float32
    y = _integer_product(e, e.op("Cast", x, to=int(ir.DataType.FLOAT)) if narrow else x, weight.astype(np.float32))
    return e.op("Cast", y, to=int(ir.DataType.from_numpy(dtype))) if narrow else y


def _integer_product(e: Emitter, x: ir.Value, weight_CN: NDArray[np.float32]) -> ir.Value:
    single = np.dtype(np.float32)
    largest = np.maximum(np.abs(weight_CN).max(axis=0, initial=0.0), np.float32(TINY))
    levels = np.rint(weight_CN.astype(np.float64) * (np.float32(LEVELS) / largest)).astype(np.int8)
    token = e.op("Max", e.reduce_max(e.op("Abs", x)), e.scalar(TINY, single))
    turned = e.op("Round", e.op("Mul", x, e.op("Div", e.scalar(LEVELS, single), token)))
    shifted = e.op("Add", turned, e.scalar(float(ZERO_POINT), single))
    words = e.op("Cast", shifted, to=int(ir.DataType.UINT8))
    zero = e.constant(np.asarray(ZERO_POINT, np.uint8))
    sums = e.op("Cast", e.op("MatMulInteger", words, e.constant(levels), zero), to=int(ir.DataType.FLOAT))
    scaled = e.op("Mul", sums, e.constant(largest / np.float32(LEVELS)))
    return e.op("Mul", scaled, e.op("Div", token, e.scalar(LEVELS, single)))


def _bfloat16(array: NDArray[Any]) -> NDArray[np.float32]:
    import ml_dtypes

    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
