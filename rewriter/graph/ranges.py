"""Which integers an input may hold: as many as the table has rows that the input looks up."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.graph.onnx import OnnxGraph, constant_of

# Operators that hand integers on unchanged, by their first input.
_VIEWS = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Transpose", "Slice"}


def integer_ranges(graph: OnnxGraph) -> dict[str, tuple[int, int]]:
    """``{input: (0, rows)}`` for every integer input that indexes a constant table, through views and casts.

    Inputs that index several tables get the fewest rows; inputs that index none are absent.
    """
    found: dict[str, tuple[int, int]] = {}
    for spec in graph.inputs:
        if spec.dtype.kind not in "iu":
            continue
        rows = _rows_looked_up(graph.value(spec.name))
        if rows:
            found[spec.name] = (0, min(rows))
    return found


def _rows_looked_up(start: ir.Value) -> list[int]:
    rows, stack, seen = [], [start], set()
    while stack:
        value = stack.pop()
        if value.name in seen:
            continue
        seen.add(value.name)
        for node, position in value.uses():
            if node.op_type == "Gather" and position == 1:
                table = node.inputs[0]
                array = None if table is None else constant_of(table)
                if array is not None and array.ndim:
                    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                    rows.append(int(array.shape[axis]))
            elif node.op_type in _VIEWS and position == 0:
                stack += list(node.outputs)
    return rows
