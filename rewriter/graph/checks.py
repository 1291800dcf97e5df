"""Whether a graph is legal: what every step that edits graphs is held to."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from rewriter.core.errors import ModelError
from rewriter.graph.composites import composite_problems, is_composite
from rewriter.graph.onnx import OnnxGraph

_SAME_DTYPE = ("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Max", "Min", "Concat", "Equal", "Less", "Greater")
_INDEX_INPUT = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterND": 1, "ScatterElements": 1}
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def check_legal(graph: OnnxGraph) -> None:
    """Raise `ModelError` listing all problems: undefined or late inputs, names used twice, values of other graphs,
    missing outputs, malformed composites, nodes against their schema, dtypes that do not fit.
    """
    problems = list(legality_problems(graph))
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ModelError(f"the graph is not legal: {shown}", "Report this as a bug if a rewrite made it")


def legality_problems(graph: OnnxGraph) -> Iterator[str]:
    """The problems in sentences, in the order of the graph."""
    if not graph.model.graph.outputs:
        yield "the graph has no outputs"
    yield from _graph_problems(graph, graph.model.graph, {})


def _graph_problems(graph: OnnxGraph, inner: ir.Graph, outer: dict[str, ir.Value]) -> Iterator[str]:
    known = dict(outer)
    for value in [*inner.inputs, *inner.initializers.values()]:
        if not value.name:
            yield "an input or a weight has no name"
        elif known.get(value.name, value) is not value:
            yield f"{value.name!r} is defined twice"
        known[value.name or ""] = value
    for value in inner.initializers.values():
        yield from _weight_problems(value)
    for node in inner:
        yield from _node_problems(graph, node, known)
        for value in node.outputs:
            if value.name and value.name in known:
                yield f"{value.name!r} is defined twice"
            known[value.name or ""] = value
    for value in inner.outputs:
        if known.get(value.name or "") is not value:
            yield f"nothing computes the output {value.name!r}"


def _weight_problems(value: ir.Value) -> Iterator[str]:
    tensor = value.const_value
    if tensor is None:
        yield f"the weight {value.name!r} has no content"
    elif value.dtype is not None and value.dtype != tensor.dtype:
        yield f"the weight {value.name!r} is {tensor.dtype} but declared {value.dtype}"
    elif value.shape is not None and list(value.shape) != list(tensor.shape):
        yield f"the weight {value.name!r} has shape {list(tensor.shape)} but is declared {list(value.shape)}"


def _node_problems(graph: OnnxGraph, node: ir.Node, known: dict[str, ir.Value]) -> Iterator[str]:
    label = f"{node.op_type} ({next((value.name for value in node.outputs if value.name), node.name)!r})"
    for value in node.inputs:
        if value is None or not value.name:
            continue
        if value.name not in known:
            yield f"{label} reads {value.name!r}, which is not defined before it"
        elif known[value.name] is not value:
            yield f"{label} reads a value {value.name!r} that belongs to another graph"
    if node.domain not in graph.model.opset_imports and (node.domain or "ai.onnx" not in graph.model.opset_imports):
        yield f"{label} is of the domain {node.domain!r}, which the model does not import"
    yield from composite_problems(node) if is_composite(node) else _schema_problems(graph, node, label)
    yield from _dtype_problems(node, label)
    for inner in _subgraphs(node):
        yield from _graph_problems(graph, inner, known)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _schema_problems(graph: OnnxGraph, node: ir.Node, label: str) -> Iterator[str]:
    if node.domain:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    except onnx.defs.SchemaError:
        yield f"{label} does not exist in opset {graph.opset}"
        return
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        yield f"{label} has {len(node.inputs)} inputs, not {schema.min_input} to {schema.max_input}"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        yield f"{label} has {len(node.outputs)} outputs, not {schema.min_output} to {schema.max_output}"
    for name in node.attributes:
        if name not in schema.attributes:
            yield f"{label} has the attribute {name}, unknown in opset {graph.opset}"
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            yield f"{label} lacks its attribute {name}"


def _dtype_problems(node: ir.Node, label: str) -> Iterator[str]:
    if node.domain:
        return
    dtypes = [value.dtype if value is not None else None for value in node.inputs]
    if node.op_type in _SAME_DTYPE:
        given = {dtype for dtype in dtypes if dtype is not None}
        if len(given) > 1:
            yield f"{label} mixes {', '.join(sorted(map(str, given)))}"
    place = _INDEX_INPUT.get(node.op_type)
    if place is not None and len(dtypes) > place and dtypes[place] not in (None, *_INTEGERS):
        yield f"{label} has indices of {dtypes[place]}"
    if node.op_type in ("Where", "If") and dtypes and dtypes[0] not in (None, ir.DataType.BOOL):
        yield f"{label} has a condition of {dtypes[0]}"
