"""Writes standard ONNX nodes in place of a composite: unique names, shared constants, constants of the right dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.onnx import constant_of

_LAST = np.iinfo(np.int64).max
_SAME_RANK = frozenset(
    "Cast Transpose Softmax Identity Neg Sqrt Tanh Sigmoid Relu Erf Gelu Slice Concat Pad Clip Exp Dropout "  # noqa: SIM905
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization RotaryEmbedding Rotary HeadNorm".split()
)
_BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Where", "MatMul", "Linear", "Max", "Min"))


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
        if self.opset >= 18:
            return self.op("ReduceMean", x, self.ints(-1), keepdims=1)
        return self.op("ReduceMean", x, axes=[-1], keepdims=1)

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


def dtype_of(value: ir.Value) -> np.dtype[Any]:
    """The floating dtype of a value: as declared, or that of the first floats its producers are known to read."""
    known = _search(value, _declared_float)
    return np.dtype(np.float32) if known is None else known


def _declared_float(value: ir.Value) -> np.dtype[Any] | None:
    producer = value.producer()
    if value.dtype is None and producer is not None and producer.op_type == "Cast":
        return ir.DataType(producer.attributes["to"].as_int()).numpy()
    return value.dtype.numpy() if value.dtype is not None and value.dtype.is_floating_point() else None


def _search(value: ir.Value, look: Callable[[ir.Value], Any]) -> Any:
    """What `look` finds first, walking back from `value` through producers, nearest first."""
    todo, seen = [value], {id(value)}
    while todo:
        current = todo.pop(0)
        found = look(current)
        if found is not None:
            return found
        producer = current.producer()
        for read in () if producer is None else producer.inputs:
            if read is not None and id(read) not in seen:
                seen.add(id(read))
                todo.append(read)
    return None


def rank_of(value: ir.Value) -> int:
    """How many axes a value has: as declared, or worked out through the operators that make it.

    Raises `UnsupportedOperator` where neither says.
    """
    rank = _rank(value, {})
    if rank is None:
        producer = value.producer()
        kind, node = ("graph input", value.name) if producer is None else (producer.op_type, producer.name)
        raise UnsupportedOperator("the standard form", kind, node or "", f"{value.name!r} has no declared shape")
    return rank


def declare(value: ir.Value) -> None:
    """Give a value without type or shape what can be worked out: its dtype, and its number of axes, of unknown size."""
    dtype, rank = _search(value, _declared_float), _rank(value, {})
    if value.type is None and dtype is not None:
        value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
    if value.type is not None and value.shape is None and rank is not None:
        value.shape = ir.Shape([None] * rank)


def _rank(value: ir.Value, known: dict[int, int | None]) -> int | None:
    if value.shape is not None:
        return value.shape.rank()
    if id(value) not in known:
        known[id(value)] = None
        node = value.producer()
        known[id(value)] = None if node is None else _rank_made_by(node, known)
    return known[id(value)]


def _rank_made_by(node: ir.Node, known: dict[int, int | None]) -> int | None:
    kind = node.op_type
    if kind in ("SplitHeads", "Gemm"):
        return 4 if kind == "SplitHeads" else 2
    if kind == "Attention" and node.domain:
        return 3
    ranks = [None if read is None else _rank(read, known) for read in node.inputs]
    if kind in _SAME_RANK:
        return ranks[0]
    if kind in _BROADCAST:
        return None if None in ranks else max(rank for rank in ranks if rank is not None)
    if kind == "Gather" and ranks[0] is not None and ranks[1] is not None:
        return ranks[0] + ranks[1] - 1
    if kind == "Reshape" and node.inputs[1] is not None:
        return _length(node.inputs[1])
    if kind in ("Unsqueeze", "Squeeze") and ranks[0] is not None:
        axes = _axes(node)
        return None if axes is None else ranks[0] + (len(axes) if kind == "Unsqueeze" else -len(axes))
    return None


def _length(shape: ir.Value) -> int | None:
    array = constant_of(shape)
    if array is not None:
        return int(array.size)
    declared = shape.shape[0] if shape.shape is not None and shape.shape.rank() == 1 else None
    if isinstance(declared, int):
        return declared
    node = shape.producer()
    if node is not None and node.op_type == "Concat":
        lengths = [None if part is None else _length(part) for part in node.inputs]
        return None if None in lengths else sum(length for length in lengths if length is not None)
    return None


def _axes(node: ir.Node) -> Sequence[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    array = constant_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return None if array is None else [int(axis) for axis in array.reshape(-1)]
