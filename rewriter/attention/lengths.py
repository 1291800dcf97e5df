"""Inputs that tell attention operators how many keys are valid: numbers that must fit the lengths of other inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from rewriter.core.site import Array
from rewriter.graph.onnx import TensorSpec

MICROSOFT = "com.microsoft"
# (domain, operator, input): what is added to the number of keys
_PLACES = {
    (MICROSOFT, "GroupQueryAttention", 5): -1,
    (MICROSOFT, "GroupQueryAttention", 6): 0,
    (MICROSOFT, "MultiHeadAttention", 4): 0,
    (MICROSOFT, "Attention", 3): 0,
    ("", "Attention", 6): 0,
}
# (domain, operator): the input that holds numbers, and the table that they index
_TABLES = {
    (MICROSOFT, "EmbedLayerNormalization"): ((0, 2), (1, 4), (8, 3)),
    (MICROSOFT, "GroupQueryAttention"): ((9, 7),),
    (MICROSOFT, "RotaryEmbedding"): ((1, 2),),
    ("", "RotaryEmbedding"): ((3, 1),),
}
_COMPARED = frozenset(("Less", "LessOrEqual", "Greater", "GreaterOrEqual"))
_PASSED = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"))


def table_of(node: ir.Node, name: str) -> str:
    """The table that an operator looks a value up in, by itself; "" if it does not."""
    names = ["" if value is None else str(value.name) for value in node.inputs]
    for position, table in _TABLES.get((node.domain, node.op_type), ()):
        if position < len(names) and names[position] == name and table < len(names):
            return names[table]
    return ""


def length_of(consumers: Mapping[str, list[ir.Node]], spec: TensorSpec) -> int | None:
    """What an integer input holds beyond the number of keys, if it is a length; None if it is none."""
    if len(spec.shape) > 1 and not (len(spec.shape) == 2 and spec.shape[1] == 1):
        return None
    for name, node in _readers(consumers, spec.name):
        names = ["" if value is None else str(value.name) for value in node.inputs]
        place = _PLACES.get((node.domain, node.op_type, names.index(name)))
        if place is not None:
            return place
    return None


def _readers(consumers: Mapping[str, list[ir.Node]], start: str) -> Iterator[tuple[str, ir.Node]]:
    """(value, node) for every node that reads a value, or what was made of it by a change of type or shape alone."""
    stack, seen = [start], set[str]()
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in consumers.get(name, []):
            yield name, node
            if node.op_type in _PASSED:
                stack += [str(value.name) for value in node.outputs]


def counted_up_to(consumers: Mapping[str, list[ir.Node]], spec: TensorSpec) -> bool:
    """Whether one integer per item is compared with positions counted in the graph: a mask is made of lengths."""
    if len(spec.shape) != 1:
        return False
    readers = [node for _, node in _readers(consumers, spec.name) if node.op_type in _COMPARED]
    return any(_counts(value) for node in readers for value in node.inputs)


def _counts(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Range":
            return True
        if node.op_type not in _PASSED:
            return False
        value = node.inputs[0]
    return False


def draw_lengths(spec: TensorSpec, shape: tuple[int, ...], beyond: int, others: Iterable[Array]) -> Array:
    """Lengths below those of the other inputs: the first row full, later ones shorter; second halves are starts."""
    arrays = list(others)
    tokens = max((a.shape[1] for a in arrays if a.ndim in (2, 3)), default=4)
    past = max((a.shape[-2] for a in arrays if a.ndim in (4, 5) and a.dtype.kind == "f"), default=0)
    batch = next((a.shape[0] for a in arrays if a.ndim in (2, 3)), 1)
    rows = np.arange(int(np.prod(shape)))
    full = tokens + past + beyond
    values = full - (rows % 3) if shape else np.array([full])
    if len(rows) == 2 * batch:
        values = np.where(rows < batch, full - rows % 2, rows % 2)
    return np.maximum(values, 0).reshape(shape).astype(spec.dtype)
