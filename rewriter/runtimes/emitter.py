"""Writes standard ONNX nodes in place of a composite: unique names, shared constants, constants of the right dtype."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from rewriter.runtimes.standard_packed import PackedProjection

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


@dataclass
class Shared:
    """What the composites of one model share once it is written out."""

    constants: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    made: dict[Hashable, tuple[ir.Value, ...]] = field(default_factory=dict)
    packed: dict[int, PackedProjection] = field(default_factory=dict)
    replaced: dict[int, tuple[ir.Value, ir.Value]] = field(default_factory=dict)


class Emitter:
    """Collects the nodes that replace `node`. `opset` is that of the graph, `dtype` that of the floats in play."""

    def __init__(self, node: ir.Node, opset: int, names: Names, shared: Shared) -> None:
        assert node.graph is not None
        self.node, self.opset = node, opset
        self.nodes: list[ir.Node] = []
        self._graph, self._names = node.graph, names
        self._constants, self._made, self._replaced = shared.constants, shared.made, shared.replaced
        self.packed = shared.packed.get(id(node))
        self._prefix = node.outputs[0].name or node.name or node.op_type

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output, of a standard operator unless a `domain` is named."""
        name = self._names.new(f"{self._prefix}/{kind}")
        node = ir.Node(domain, kind, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def once(self, key: Hashable, make: Callable[[], tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
        """What `make` emits, once per graph: composites are written in the order of the graph, so later ones may read
        what an earlier one made, if it reads nothing that comes later."""
        whole = (id(self._graph), key)
        if whole not in self._made:
            self._made[whole] = make()
        return self._made[whole]

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

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """More axes of one."""
        return self._with_axes("Unsqueeze", x, axes)

    def squeeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """Without axes of one."""
        return self._with_axes("Squeeze", x, axes)

    def _with_axes(self, kind: str, x: ir.Value, axes: tuple[int, ...]) -> ir.Value:
        return self.op(kind, x, self.ints(*axes)) if self.opset >= 13 else self.op(kind, x, axes=list(axes))

    def current(self, value: ir.Value) -> ir.Value:
        """What stands for a value that a composite made before it was written out."""
        return self._replaced.get(id(value), (value, value))[1]

    def replace(self, result: ir.Value) -> None:
        """Put the nodes where the composite was; `result` takes over its output's name, type and readers."""
        old = self.node.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        old.name = None
        self._replaced[id(old)] = (old, result)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self._graph.insert_before(self.node, self.nodes)
        self._graph.remove(self.node, safe=True)


def _type(array: np.ndarray) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(array.dtype))
