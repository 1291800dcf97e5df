"""A copy of a quantised graph that computes in floats, to look at: what is found there can be mapped, not rewritten."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.core.site import Array
from rewriter.graph.onnx import OnnxGraph, constant_of

QUANTISED = frozenset(("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "QLinearMatMul"))


def is_quantised(graph: OnnxGraph) -> bool:
    """Whether any product or weight of the graph is quantised."""
    return any(node.op_type in QUANTISED for node in graph.topological())


def dequantised(graph: OnnxGraph) -> OnnxGraph:
    """The graph with rounding of activations left out and integer products as products of floats.

    Values keep their names where they are floats in the original. Forms that are not understood stay as they are.
    """
    copy = graph.clone()
    for node in list(copy.model.graph):
        if node.op_type == "MatMulInteger":
            _integer_product(copy, node)
        elif node.op_type == "QLinearMatMul":
            _quantised_product(copy, node)
    for node in list(copy.model.graph):
        if node.op_type == "DequantizeLinear":
            _skip_rounding(node)
    RemoveUnusedNodesPass()(copy.model)
    return OnnxGraph(copy.model, graph.path)


def _skip_rounding(node: ir.Node) -> None:
    """x for DequantizeLinear(QuantizeLinear(x))."""
    source = node.inputs[0]
    before = None if source is None else source.producer()
    if before is None or before.op_type != "QuantizeLinear" or before.inputs[0] is None:
        return
    if not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(before.inputs[0])


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def _integer_product(graph: OnnxGraph, node: ir.Node) -> None:
    """Mul(Cast(MatMulInteger(quantised x, w)), x_scale * w_scale) as MatMul(x, (w - zero) * w_scale)."""
    quantised, weight = node.inputs[0], node.inputs[1]
    before = None if quantised is None else quantised.producer()
    cast = _only_user(node.outputs[0], "Cast")
    scaled = None if cast is None else _only_user(cast.outputs[0], "Mul")
    if before is None or before.op_type not in ("DynamicQuantizeLinear", "QuantizeLinear") or scaled is None:
        return
    x, levels = before.inputs[0], None if weight is None else constant_of(weight)
    scale = _weight_scale(scaled, cast)
    if x is None or levels is None or scale is None:
        return
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    _replace(graph, scaled, x, _numbers(levels, scale, zero))


def _weight_scale(scaled: ir.Node, cast: ir.Node | None) -> Array | None:
    """The constant factor among what an integer product is multiplied by."""
    assert cast is not None
    factors = [value for value in scaled.inputs if value is not None and value is not cast.outputs[0]]
    found = None
    while factors:
        value = factors.pop()
        array, producer = constant_of(value), value.producer()
        if array is not None:
            found = array if found is None else found * array
        elif producer is not None and producer.op_type == "Mul":
            factors += [one for one in producer.inputs if one is not None]
    return found


def _quantised_product(graph: OnnxGraph, node: ir.Node) -> None:
    """QLinearMatMul of a quantised activation as QuantizeLinear(MatMul(x, w))."""
    if len(node.inputs) != 8 or any(value is None for value in node.inputs):
        return
    a, _, _, b, b_scale, b_zero, y_scale, y_zero = node.inputs
    before = None if a is None else a.producer()
    levels, scale = (None if value is None else constant_of(value) for value in (b, b_scale))
    if before is None or before.op_type != "QuantizeLinear" or levels is None or scale is None:
        return
    x = before.inputs[0]
    if x is None:
        return
    product = _product(graph, x, _numbers(levels, scale, b_zero), f"{node.outputs[0].name}/float")
    rounded = ir.Node("", "QuantizeLinear", [product.outputs[0], y_scale, y_zero], name=f"{node.name}/rounded")
    rounded.outputs[0].name = f"{node.outputs[0].name}/rounded"
    graph.model.graph.insert_before(node, [product, rounded])
    node.outputs[0].replace_all_uses_with(rounded.outputs[0], replace_graph_outputs=True)


def _numbers(levels: Array, scale: Array, zero: ir.Value | None) -> Array:
    offset = None if zero is None else constant_of(zero)
    centred = levels.astype(np.float32) - (0.0 if offset is None else offset.astype(np.float32))
    return np.asarray(centred * scale, np.float32)


def _product(graph: OnnxGraph, x: ir.Value, weight: Array, output: str) -> ir.Node:
    name = f"{output}/weight"
    constant = ir.Value(name=name, const_value=ir.Tensor(weight, name=name))
    constant.shape, constant.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    graph.model.graph.register_initializer(constant)
    made = ir.Node("", "MatMul", [x, constant], name=output)
    made.outputs[0].name = output
    return made


def _replace(graph: OnnxGraph, old: ir.Node, x: ir.Value, weight: Array) -> None:
    """A product in place of a node, under the name of its output."""
    value = old.outputs[0]
    name = str(value.name)
    value.name = f"{name}/quantised"
    made = _product(graph, x, weight, name)
    graph.model.graph.insert_before(old, [made])
    value.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
