"""Numbers of one width where a graph mixes two: half-precision exports add float32 masks to scores they widened."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.attention.build import Builder

_DEPTH = 64
_SECOND = ("Where", "CastLike")


def element_type(value: ir.Value) -> ir.DataType | None:
    """The element type of a value, looked for in what it is made from; None if nothing there says it."""
    for _ in range(_DEPTH):
        if value.const_value is not None:
            return value.const_value.dtype
        node = value.producer()
        if node is None or value.dtype is not None:
            return value.dtype
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "Constant" and "value" in node.attributes:
            return node.attributes["value"].as_tensor().dtype
        source = node.inputs[1 if node.op_type in _SECOND else 0] if node.inputs else None
        if source is None:
            return None
        value = source
    return None


def other_dtype(b: Builder, name: str) -> np.dtype[np.generic] | None:
    """The float dtype of a value of the graph if it is not the one that is computed in."""
    found = None if b.dtype is None else element_type(b.value(name))
    if found is None or not found.is_floating_point() or found.numpy() == b.dtype:
        return None
    return np.dtype(found.numpy())


def as_computed(b: Builder, name: str, output: str = "") -> str:
    """A float value in the dtype that is computed in. Numbers too low for float16 become its lowest, infinity stays."""
    found = element_type(b.value(name))
    wanted = None if b.dtype is None else ir.DataType.from_numpy(b.dtype)
    if found is None or wanted is None or found == wanted or not found.is_floating_point():
        return b.op("Identity", name, output=output)
    if wanted != ir.DataType.FLOAT16 or found == ir.DataType.BFLOAT16:
        return b.op("Cast", name, to=int(wanted), output=output)
    wide = found.numpy()
    near = b.op("Cast", b.op("Max", name, b.constant(np.array(b.lowest, wide))), to=int(wanted))
    infinite = b.op("Equal", name, b.constant(np.array(-np.inf, wide)))
    return b.op("Where", infinite, b.constant(np.array(-np.inf, np.float16)), near, output=output)
