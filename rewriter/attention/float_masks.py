"""Inputs of real numbers that are masks: nobody says so, but what is made of them makes sense for 0 and 1 alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from rewriter.core.site import Array
from rewriter.graph.onnx import OnnxGraph

HIDES = 1e3  # factors from here on take keys out
_PASSED = frozenset(
    ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Transpose", "Mul")
)
_SHIFTED = frozenset(("Sub", "Add"))


def is_float_mask(graph: OnnxGraph, consumers: Mapping[str, list[ir.Node]], start: str) -> bool:
    """Whether an input is compared with 0 or 1, or moved by a constant and then multiplied by a vast one.

    ``(1 - mask) * -1e4`` is such a use; ``time * 1000`` is none.
    """
    stack, seen = [(start, False)], set[tuple[str, bool]]()
    while stack:
        entry = stack.pop()
        if entry in seen:
            continue
        seen.add(entry)
        name, moved = entry
        for node in consumers.get(name, []):
            constant = _other_operand(graph, node, name)
            if node.op_type == "Equal" and constant in (0.0, 1.0):
                return True
            if node.op_type == "Mul" and moved and constant is not None and abs(constant) >= HIDES:
                return True
            if _goes_on(node, name, constant):
                later = moved or node.op_type in _SHIFTED
                stack += [(str(value.name), later) for value in node.outputs]
    return False


def softened(mask: Array) -> Array:
    """The mask with halves for ones in every second item: what holds for 0 and 1 alone is not claimed."""
    mask[1::2] *= mask.dtype.type(0.5)
    return mask


def _goes_on(node: ir.Node, name: str, constant: float | None) -> bool:
    if node.op_type in (*_SHIFTED, "Mul"):
        return constant is not None
    data = node.inputs[0] if node.inputs else None
    return node.op_type in _PASSED and data is not None and data.name == name


def _other_operand(graph: OnnxGraph, node: ir.Node, name: str) -> float | None:
    """The one number that a node of two operands joins a value with; None where it is no constant."""
    names = ["" if value is None else str(value.name) for value in node.inputs]
    if len(names) != 2 or name not in names or names[0] == names[1]:
        return None
    array = graph.constant(names[1 - names.index(name)])
    if array is None or array.size != 1 or array.dtype.kind not in "fiu":
        return None
    return float(np.asarray(array).ravel()[0])
