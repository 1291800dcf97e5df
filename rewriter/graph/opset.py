"""A graph at a later opset, where that changes nothing but the number.

Most operators of a later opset only take more types. Where more than that changed the graph is refused, but for the
few moves that the graphs of exporters need.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.onnx import OnnxGraph

# From this opset on the operator means something else though its schema looks the same.
_CHANGED = {"GroupNormalization": 21}
_LEAST_IR = {23: 11, 24: 12}
_LEAST = 13  # softmaxes before that are other functions, and axes of much else are written otherwise
_AXES_AS_INPUT = frozenset(
    "ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare".split()  # noqa: SIM905
)


def at_least(graph: OnnxGraph, opset: int) -> OnnxGraph:
    """A copy of a graph at this opset, or the graph itself if it has it. Inputs and outputs stay as they are.

    Raises `UnsupportedOperator` for a node whose meaning or way of writing changed in between.
    """
    before = graph.opset
    if before >= opset:
        return graph
    result = graph.clone()
    if before < _LEAST or result.model.functions:
        what = "a local function" if result.model.functions else f"a graph of opset {before}"
        raise UnsupportedOperator(f"opset {opset}", what, "")
    for part in result.model.graphs():
        for node in list(part):
            if node.domain in ("", "ai.onnx"):
                _move(part, node, before, opset)
        if part.opset_imports:
            part.opset_imports[""] = opset
    result.model.opset_imports[""] = opset
    result.model.ir_version = max(result.model.ir_version, _LEAST_IR.get(opset, 0))
    return OnnxGraph(result.model, graph.path)


def _move(part: ir.Graph | ir.Function, node: ir.Node, before: int, after: int) -> None:
    old, new = (onnx.defs.get_schema(node.op_type, opset, "") for opset in (before, after))
    if old.since_version == new.since_version:
        return
    axes = node.attributes.get("axes")
    if node.op_type in _AXES_AS_INPUT and old.since_version < 18 <= new.since_version:
        if axes is not None:
            _axes_as_input(part, node, list(axes.as_ints()))
        return
    if node.op_type == "Split" and old.since_version < 18 and len(node.inputs) < 2:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    changed = _CHANGED.get(node.op_type, after + 1)
    if before < changed <= after or not _reads_alike(node, old, new):
        why = f"it is another operator in opset {after} than in {before}"
        raise UnsupportedOperator(f"opset {after}", node.op_type, node.name or "", why)


def _axes_as_input(part: ir.Graph | ir.Function, node: ir.Node, axes: list[int]) -> None:
    constant = ir.Node(
        "", "Constant", [], [ir.AttrTensor("value", ir.tensor(axes, dtype=ir.DataType.INT64))], num_outputs=1
    )
    constant.outputs[0].name = f"{node.outputs[0].name}/axes"
    part.insert_before(node, constant)
    node.attributes.pop("axes")
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])


def _reads_alike(node: ir.Node, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """Whether what this node has is still there, and what it lacks has the default it had."""
    if any(a.name != b.name or a.option != b.option for a, b in zip(old.inputs, new.inputs, strict=False)):
        return False
    if len(node.inputs) > new.max_input or len(new.inputs) < len(old.inputs) or new.min_input > old.min_input:
        return False
    for name, own in old.attributes.items():
        other = new.attributes.get(name)
        if other is None and name in node.attributes:
            return False
        if other is not None and name not in node.attributes and _default(own) != _default(other):
            return False
    return all(
        name in old.attributes or not attribute.required for name, attribute in new.attributes.items()
    ) and _types_kept(node, new)


def _types_kept(node: ir.Node, new: onnx.defs.OpSchema) -> bool:
    """Later operators take more types, never fewer; what is not known is taken to fit."""
    allowed = {entry.type_param_str: set(entry.allowed_type_strs) for entry in new.type_constraints}
    for value, formal in zip(node.inputs, new.inputs, strict=False):
        if value is None or value.dtype is None or formal.type_str not in allowed:
            continue
        if f"tensor({_type_name(value.dtype)})" not in allowed[formal.type_str]:
            return False
    return True


def _type_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float", "DOUBLE": "double"}.get(dtype.name, dtype.name.lower())


def _default(attribute: onnx.defs.OpSchema.Attribute) -> bytes:
    value: bytes = attribute.default_value.SerializeToString()
    return value
