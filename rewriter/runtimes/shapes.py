"""What is known of values that nobody declared: dtype and axes, worked out backwards through what makes them.

Shape inference stops at composites, and lowered graphs declare little. Only what writing composites out needs is here:
how many axes, which of them have fixed sizes, which float dtype. Unknown stays unknown, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.onnx import constant_of

Size = int | str | None
Sizes = tuple[Size, ...]
_Known = dict[int, Sizes | None]

_SAME = frozenset(
    "Cast Softmax Identity Neg Sqrt Tanh Sigmoid Relu Erf Gelu Clip Exp Dropout LayerNormalization "  # noqa: SIM905
    "RMSNormalization SimplifiedLayerNormalization RotaryEmbedding Rotary HeadNorm IsNaN Not".split()
)
_SAME_RANK = frozenset(("Slice", "Concat", "Pad", "CumSum", "ReduceMean"))
_BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "And", "Or"))


def sizes_of(value: ir.Value, rank: int | None = None) -> Sizes:
    """The axes of a value: a number, a name, or None where the size is not known.

    Where not even their number is known it is taken to be `rank`; without that, raises `UnsupportedOperator`.
    """
    sizes = _sizes(value, {})
    if sizes is None and rank is not None:
        return (None,) * rank
    if sizes is None:
        producer = value.producer()
        kind, node = ("graph input", value.name) if producer is None else (producer.op_type, producer.name)
        raise UnsupportedOperator("the standard form", kind, node or "", f"{value.name!r} has no declared shape")
    return sizes


def dtype_of(value: ir.Value) -> np.dtype[Any]:
    """The float dtype of a value: as declared, or of the nearest declared floats it is made from; else float32."""
    return _float_dtype(value) or np.dtype(np.float32)


def declare(value: ir.Value) -> None:
    """Give a value without type or shape those that can be worked out."""
    dtype, sizes = _float_dtype(value), _sizes(value, {})
    if value.type is None and dtype is not None:
        value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
    if value.type is not None and value.shape is None and sizes is not None:
        value.shape = ir.Shape(sizes)


def _float_dtype(value: ir.Value) -> np.dtype[Any] | None:
    """Breadth first, so that the nearest declaration counts."""
    todo, seen = [value], {id(value)}
    while todo:
        current = todo.pop(0)
        found = _declared_float(current)
        if found is not None:
            return found
        producer = current.producer()
        for read in () if producer is None else producer.inputs:
            if read is not None and id(read) not in seen:
                seen.add(id(read))
                todo.append(read)
    return None


def _declared_float(value: ir.Value) -> np.dtype[Any] | None:
    producer, declared = value.producer(), value.dtype
    if declared is None and value.const_value is not None:
        declared = value.const_value.dtype
    if declared is None and producer is not None and producer.op_type == "Cast":
        declared = ir.DataType(producer.attributes["to"].as_int())
    return declared.numpy() if declared is not None and declared.is_floating_point() else None


def _sizes(value: ir.Value | None, known: _Known) -> Sizes | None:
    if value is None:
        return None
    if value.shape is not None:
        return tuple(size if isinstance(size, int) else size.value for size in value.shape)
    if value.const_value is not None:
        return tuple(int(size) for size in value.const_value.shape.numpy())
    if id(value) not in known:
        known[id(value)] = None
        node = value.producer()
        known[id(value)] = None if node is None else _made_by(node, known)
    return known[id(value)]


def _made_by(node: ir.Node, known: _Known) -> Sizes | None:
    inputs = [_sizes(read, known) for read in node.inputs]
    kind = node.op_type
    if kind == "Attention" and not node.domain:
        return None
    if kind in _RULES:
        return None if inputs[0] is None else _RULES[kind](node, inputs)
    if kind in _SAME:
        return inputs[0]
    if kind in _SAME_RANK:
        return None if inputs[0] is None else (None,) * len(inputs[0])
    return _broadcast(inputs) if kind in _BROADCAST else None


def _broadcast(shapes: list[Sizes | None]) -> Sizes | None:
    given = [shape for shape in shapes if shape is not None]
    if len(given) != len(shapes):
        return None
    rank = max(map(len, given))
    padded = [(1,) * (rank - len(shape)) + shape for shape in given]
    return tuple(_common([shape[axis] for shape in padded]) for axis in range(rank))


def _common(sizes: list[Size]) -> Size:
    """Size of an axis whose operands have these: 1 gives way, and an unknown beside a larger number is that number."""
    wide = [size for size in sizes if isinstance(size, int) and size > 1]
    others = {size for size in sizes if size != 1}
    if wide:
        return wide[0]
    return 1 if not others else others.pop() if len(others) == 1 else None


def _matmul(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    left, right = inputs[0], inputs[1]
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    leading = _broadcast([left[:-2], right[:-2]]) if max(len(left), len(right)) > 2 else ()
    return None if leading is None else (*leading, left[-2], right[-1])


def _linear(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    x, weight = inputs[0], inputs[1]
    return None if x is None else (*x[:-1], None if weight is None else weight[-1])


def _split_heads(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    (batch, tokens, width), heads = inputs[0] or (None,) * 3, node.attributes["heads"].as_int()
    return batch, heads, tokens, width // heads if isinstance(width, int) else None


def _attention(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    query, value, heads = inputs[0], inputs[2], node.attributes["heads"].as_int()
    if query is None:
        return None
    width = value[-1] if value is not None else None
    if value is not None and isinstance(width, int) and len(value) == 3:
        width //= node.attributes["value_heads"].as_int()
    return query[0], query[-2], width * heads if isinstance(width, int) else None


def _transpose(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    x = inputs[0] or ()
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else reversed(range(len(x)))
    return tuple(x[axis] for axis in order)


def _reshape(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    x, shape = inputs[0] or (), node.inputs[1]
    wanted = None if shape is None else constant_of(shape)
    if wanted is None:
        rank = inputs[1][0] if inputs[1] else None
        return (None,) * rank if isinstance(rank, int) else None
    copied: list[Size] = [x[axis] if size == 0 and axis < len(x) else int(size) for axis, size in enumerate(wanted)]
    return tuple(None if size in (0, -1) else size for size in copied)


def _gather(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    data, indices = inputs[0], inputs[1]
    return None if data is None or indices is None else (None,) * (len(data) + len(indices) - 1)


def _axes(node: ir.Node, inputs: list[Sizes | None]) -> Sizes | None:
    if "axes" in node.attributes:
        count: int | None = len(node.attributes["axes"].as_ints())
    else:
        given = constant_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        count = None if given is None else int(given.size)
    if count is None or inputs[0] is None:
        return None
    return (None,) * (len(inputs[0]) + (count if node.op_type == "Unsqueeze" else -count))


_RULES: dict[str, Callable[[ir.Node, list[Sizes | None]], Sizes | None]] = {
    "Attention": _attention,
    "Gather": _gather,
    "Gemm": lambda node, inputs: (None, None),
    "Linear": _linear,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "SplitHeads": _split_heads,
    "Squeeze": _axes,
    "Transpose": _transpose,
    "Unsqueeze": _axes,
}
