"""Writes standard ONNX nodes in place of a composite: unique names, shared constants, constants of the right dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

_LAST = np.iinfo(np.int64).max


class Names:
    """Hands out names that nothing in a model has yet."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in model.graphs():
            self._taken |= {value.name for value in graph.inputs if value.name} | set(graph.initializers)
            for node in graph:
                self._taken |= {name for name in (node.name, *(value.name for value in node.outputs)) if name}

    def new(self, wanted: str) -> str:
        """`wanted`, or `wanted` with a number."""
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name


class Emitter:
    """Collects the nodes that replace `node`. `opset` is that of the graph, `dtype` that of the floats in play."""

    def __init__(self, node: ir.Node, opset: int, names: Names, constants: dict[tuple[Any, ...], ir.Value]) -> None:
        assert node.graph is not None
        self.node, self.opset = node, opset
        self.nodes: list[ir.Node] = []
        self._graph, self._names, self._constants = node.graph, names, constants
        self._prefix = node.outputs[0].name or node.name or node.op_type

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """One standard node with one output."""
        name = self._names.new(f"{self._prefix}/{kind}")
        node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initialiser; equal ones of one graph are the same value."""
        key = (id(self._graph), array.dtype.str, array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._names.new(f"{self._prefix}/constant")
            value = ir.Value(
                name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape), type=_type(array)
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def scalar(self, value: float, dtype: np.dtype[Any]) -> ir.Value:
        """A floating constant without axes."""
        return self.constant(np.asarray(value, dtype=dtype))

    def cut(self, x: ir.Value, start: int, end: int | None = None, step: int = 1) -> ir.Value:
        """``x[..., start:end:step]``."""
        stop = _LAST if end is None else end
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(-1), self.ints(step))

    def mean(self, x: ir.Value) -> ir.Value:
        """Mean over the last axis, which is kept."""
        return self.reduce("ReduceMean", x)

    def reduce(self, kind: str, x: ir.Value) -> ir.Value:
        """A reduction over the last axis, which is kept."""
        if self.opset >= 18:
            return self.op(kind, x, self.ints(-1), keepdims=1)
        return self.op(kind, x, axes=[-1], keepdims=1)

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        """One more axis."""
        return self.op("Unsqueeze", x, self.ints(axis)) if self.opset >= 13 else self.op("Unsqueeze", x, axes=[axis])

    def replace(self, result: ir.Value) -> None:
        """Put the nodes where the composite was; `result` takes over its output's name, type and readers."""
        old = self.node.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        old.name = None
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self._graph.insert_before(self.node, self.nodes)
        self._graph.remove(self.node, safe=True)


def _type(array: np.ndarray) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(array.dtype))
