"""A copy of a quantised graph that computes in floats, to look at: what is found there can be mapped, not rewritten.

Every quantised value gets a twin in floats: what was rounded to it, or what a quantised operator would give without
rounding. Outputs keep their names; operators that are not understood stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.attention.quantised_forms import FORMS, MICROSOFT, VIEWS, numbers_of
from rewriter.core.site import Array
from rewriter.graph.onnx import OnnxGraph, constant_of

_ROUNDING = frozenset(("QuantizeLinear", "DynamicQuantizeLinear"))
QUANTISED = _ROUNDING | {"DequantizeLinear", "MatMulInteger"} | {name for _, name in FORMS}


def is_quantised(graph: OnnxGraph) -> bool:
    """Whether any product or weight of the graph is quantised."""
    return any(node.op_type in QUANTISED for node in graph.topological())


def dequantised(graph: OnnxGraph) -> OnnxGraph:
    """The graph with rounding of activations left out and products of integers as products of floats."""
    copy = graph.clone()
    floats = Floats(copy)
    for node in copy.topological():
        floats.visit(node)
    copy.model.graph.sort()
    copy.model.opset_imports.setdefault(MICROSOFT, 1)
    RemoveUnusedNodesPass()(copy.model)
    return OnnxGraph(copy.model, graph.path)


class Floats:
    """Adds twins in floats to a graph, node by node in order."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.twins: dict[ir.Value, ir.Value] = {}
        self._at: ir.Node | None = None
        self._count = 0

    def visit(self, node: ir.Node) -> None:
        """Give the results of a node their twins, or put floats in the place of float results."""
        self._at = node
        first = node.inputs[0] if node.inputs else None
        form = FORMS.get((node.domain, node.op_type))
        if node.op_type in _ROUNDING and first is not None:
            saturates = node.op_type == "QuantizeLinear"
            self.twins[node.outputs[0]] = self.clipped(first, node, 2) if saturates else first
        elif node.op_type == "DequantizeLinear" and first in self.twins:
            self.give(node.outputs[0], self.twins[first])
        elif node.op_type == "MatMulInteger":
            self._integer_product(node)
        elif form is not None:
            form(self, node)
        elif node.op_type in VIEWS and not node.domain and first in self.twins:
            self._viewed(node)

    def of(self, node: ir.Node, position: int, scale: int, zero: int | None) -> ir.Value | None:
        """The float that an input stands for; None if it cannot be told."""
        value = self.input(node, position)
        if value is None or value in self.twins:
            return None if value is None else self.twins[value]
        levels, factor = constant_of(value), self.number(node, scale)
        if factor is None:
            return None
        if levels is None:
            return self.make("DequantizeLinear", [value, self.input(node, scale), self.input(node, zero)])
        return self.constant(f"{value.name}/float", numbers_of(levels, factor, self.number(node, zero)))

    def clipped(self, value: ir.Value, node: ir.Node, zero: int) -> ir.Value:
        """A value, without what lies below zero where its levels begin at zero: quantisers drop a Relu there."""
        point, maker = self.number(node, zero), value.producer()
        lowest = self.input(node, zero) is None or (
            point is not None and point.dtype.kind in "iu" and bool((point == np.iinfo(point.dtype).min).all())
        )
        if not lowest or maker is None or maker.op_type not in ("Add", "Conv", "Gemm", "MatMul"):
            return value
        return self.make("Relu", [value])

    def input(self, node: ir.Node, position: int | None) -> ir.Value | None:
        """An input that is given."""
        return node.inputs[position] if position is not None and position < len(node.inputs) else None

    def number(self, node: ir.Node, position: int | None) -> Array | None:
        """The array of a constant input."""
        value = self.input(node, position)
        return None if value is None else constant_of(value)

    def make(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """A node before the one that is visited; its result is named after that one's."""
        assert self._at is not None
        made = ir.node(kind, inputs, attributes, domain=domain)
        self._count += 1
        made.name = f"{self._at.name or self._at.outputs[0].name}/{kind.lower()}_{self._count}"
        made.outputs[0].name = f"{self._at.outputs[0].name}/{kind.lower()}_{self._count}"
        self.graph.model.graph.insert_before(self._at, made)
        return made.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """A constant by name; the same one if it is there."""
        known = self.graph.model.graph.initializers
        if name in known:
            return known[name]
        array = np.asarray(array, np.float32)
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        self.graph.model.graph.register_initializer(value)
        return value

    def give(self, old: ir.Value, new: ir.Value) -> None:
        """A float value in place of another one, under its name where it was made for it."""
        name, old.name = old.name, f"{old.name}/quantised"
        node = new.producer()
        fresh = node is not None and bool(new.name) and str(new.name).startswith(f"{name}/")
        if not fresh and old.is_graph_output():
            new, fresh = self.make("Identity", [new]), True
        if fresh and not new.is_graph_output():
            new.name = name
        if old.is_graph_output():
            new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def _viewed(self, node: ir.Node) -> None:
        copied = ir.Node(
            "",
            node.op_type,
            [self.twins.get(value, value) if value is not None else None for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{node.name or node.outputs[0].name}/float",
        )
        self.graph.model.graph.insert_before(node, copied)
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name = f"{old.name}/float" if old.name else ""
            self.twins[old] = new

    def _integer_product(self, node: ir.Node) -> None:
        """Mul(Cast(MatMulInteger(quantised x, w)), x_scale * w_scale) as MatMul(x, (w - zero) * w_scale)."""
        x, levels = self.twins.get(node.inputs[0]) if node.inputs[0] else None, self.number(node, 1)
        cast = _only_user(node.outputs[0], "Cast")
        scaled = None if cast is None else _only_user(cast.outputs[0], "Mul")
        if x is None or levels is None or cast is None or scaled is None or node.inputs[1] is None:
            return
        scale = _weight_scale(scaled, cast)
        if scale is None:
            return
        weight = self.constant(f"{node.inputs[1].name}/float", numbers_of(levels, scale, self.number(node, 3)))
        self._at = scaled
        self.give(scaled.outputs[0], self.make("MatMul", [x, weight]))


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def _weight_scale(scaled: ir.Node, cast: ir.Node) -> Array | None:
    """The constant factor among what an integer product is multiplied by."""
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
