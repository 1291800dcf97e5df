"""Linear layers in number formats, written out in standard ONNX.

int8 is exact to the meaning of the composite: levels of each token between its own least and largest number,
`MatMulInteger` on unsigned bytes (signed ones take five times as long in ONNX Runtime), levels of each column of the
weight. (`DynamicQuantizeLinear`, the only dynamic quantisation below opset 21, has one scale for a whole tensor: it is
not what was measured, and `MatMulInteger` takes one zero point in practice, so those of tokens are subtracted after
it.) bf16 rounds the weight
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

LEVELS, STEPS, TINY = 127.0, 254.0, 1e-30


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
    none = e.scalar(0.0, single)
    low, high = e.op("Min", e.reduce("ReduceMin", x), none), e.op("Max", e.reduce("ReduceMax", x), none)
    span = e.op("Max", e.op("Sub", high, low), e.scalar(TINY, single))
    steps = e.op("Div", e.scalar(STEPS, single), span)
    zero = e.op("Round", e.op("Mul", e.op("Neg", low), steps))
    rounded = e.op("Round", e.op("Add", e.op("Mul", x, steps), zero))
    sums = e.op("MatMulInteger", e.op("Cast", rounded, to=int(ir.DataType.UINT8)), e.constant(levels))
    added = e.op("Mul", zero, e.constant(levels.sum(axis=0, dtype=np.int64).astype(np.float32)))
    whole = e.op("Sub", e.op("Cast", sums, to=int(ir.DataType.FLOAT)), added)
    scaled = e.op("Mul", whole, e.constant(largest / np.float32(LEVELS)))
    return e.op("Mul", scaled, e.op("Div", span, e.scalar(STEPS, single)))


def _bfloat16(array: NDArray[Any]) -> NDArray[np.float32]:
    import ml_dtypes

    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
