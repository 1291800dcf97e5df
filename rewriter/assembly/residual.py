"""Finds the residual stream that a site's output is added to."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from rewriter.graph.onnx import OnnxGraph, reads

_SAME_ROWS = {"Identity", "Cast", "Dropout", "Reshape"}  # keep the order of rows and their content


def residual_of(graph: OnnxGraph, output: str, later: Collection[str] = ()) -> str | None:
    """The other operand of the addition that consumes `output`, or None where there is no such stream.

    Additions of constants (a bias written apart) are passed through, since they do not change differences. None also
    when the operand depends on `output` or on a name in `later` (outputs of sites above): it is no stream from below.
    """
    value: ir.Value | None = graph.value(output)
    while value is not None:
        following = None
        for node, _ in value.uses():
            if node.op_type == "Add" and not node.domain:
                other = next((v for v in node.inputs if v is not None and v is not value), None)
                if other is None or other.name is None:
                    continue
                if graph.constant(other.name) is None:
                    return None if depends_on(graph, other.name, {output, *later}) else other.name
                following = node.outputs[0]
            elif node.op_type in _SAME_ROWS and not node.domain and node.inputs[0] is value:
                following = node.outputs[0]
        value = following
    return None


def depends_on(graph: OnnxGraph, name: str, sources: Collection[str]) -> bool:
    """Whether the value `name` is computed from any of `sources` (or is one of them)."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        current = queue.pop()
        if current in sources:
            return True
        if current in seen:
            continue
        seen.add(current)
        producer = graph.value(current).producer()
        if producer is not None:
            queue += reads(producer)
    return False
