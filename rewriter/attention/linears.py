"""Linear nodes: which weights they multiply by, and where their input has its batch axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.recipes import Ledger, Recipe, pick, stored
from rewriter.attention.trace import Trace, inputs_of, outputs_of
from rewriter.core.refusal import Refused
from rewriter.core.site import Array

BEYOND_LIMIT = 400


@dataclass(frozen=True)
class Linear:
    """``result = data @ weight_CN + bias_N`` of one node; `source` is the data with a batch axis of its own.

    `rows` is (first, product of the other) row axes of the source.
    """

    node: ir.Node
    result: str
    source: str
    rows: tuple[int, int]
    rank: int
    weight_CN: Array
    bias_N: Array | None
    weight_name: str
    bias_name: str
    dtype: np.dtype[np.generic]
    weight_value: str
    transposed: bool
    alpha: float
    ledger: Ledger | None  # where cuts from a drawn weight are noted; None if the weight is the model's own

    def columns(self, order: Array, factor: float = 1.0) -> Array:
        """``factor * weight_CN[:, order]``."""
        return self._cut(1, order, factor)

    def rows_of(self, order: Array, factor: float = 1.0) -> Array:
        """``factor * weight_CN[order]``."""
        return self._cut(0, order, factor)

    def scaled(self, array: Array, factor: float) -> Array:
        """A cut times a factor."""
        result = np.float64(factor) * array
        if self.ledger is None:
            return stored(result, array.dtype)
        recipe = self.ledger[id(array)][1]
        self.ledger[id(result)] = result, replace(recipe, factor=recipe.factor * factor)
        return np.asarray(result)

    def _cut(self, axis: int, order: Array, factor: float) -> Array:
        cut = pick(self.weight_CN, order, axis)
        cut = cut if factor == 1.0 else cut * factor
        if self.ledger is None:
            return stored(cut, self.dtype)
        recipe = Recipe(self.weight_value, self.transposed, axis, order, factor * self.alpha, self.dtype)
        self.ledger[id(cut)] = cut, recipe
        return cut


def read_linear(trace: Trace, node: ir.Node, batched: bool | None = True) -> Linear:
    """What a linear node multiplies by, from the graph's constants; raises `Refused` for forms rewrites cannot map.

    With `batched` the source must have a batch axis of its own; None asks for one where there is one; with False it is
    what the node reads.
    """
    found = trace.linear(node)
    if found is None or found[0] != 0 or node.op_type not in ("MatMul", "Gemm"):
        raise Refused("linear-form", f"linear {node.op_type}", (node.name or "",))
    names = inputs_of(node)
    weight = only_matrix(trace.value(found[1]))
    bias: Array | None = None
    transposed, alpha = False, 1.0
    if node.op_type == "Gemm":
        transposed, alpha = bool(_attribute(node, "transB", 0)), _attribute(node, "alpha", 1.0)
        weight, bias = _gemm(trace, node, weight)
    data = names[0] if batched is False else _with_batch(trace, names[0], batched is None)
    shape = trace.shape(data)
    return Linear(
        node,
        outputs_of(node)[0],
        data,
        (shape[0], int(np.prod(shape[1:-1]))),
        len(shape),
        weight,
        bias,
        trace.original_initializer(found[1]),
        trace.original_initializer(names[2]) if bias is not None else "",
        trace.weight_dtype(found[1]),
        found[1],
        transposed,
        alpha,
        trace.recipes if trace.drawn(found[1]) else None,
    )


def only_matrix(weight: Array) -> Array:
    """The two-dimensional matrix behind a weight; raises `Refused` if there is not just one."""
    if weight.ndim < 2:
        raise Refused("linear-form", "weight with fewer than two axes")
    flat = weight.reshape(-1, *weight.shape[-2:])
    # decomposed torch graphs expand one matrix over the batch
    if len(flat) > 1 and not (flat == flat[:1]).all():
        raise Refused("linear-form", "different weights along a leading axis")
    return flat[0]


def _gemm(trace: Trace, node: ir.Node, weight: Array) -> tuple[Array, Array | None]:
    if _attribute(node, "transA", 0):
        raise Refused("linear-form", "Gemm with transA")
    weight, alpha = (weight.T if _attribute(node, "transB", 0) else weight), _attribute(node, "alpha", 1.0)
    weight = weight if alpha == 1.0 else weight * alpha
    names = inputs_of(node)
    if len(names) < 3 or not names[2]:
        return weight, None
    if names[2] not in trace.fixed:
        raise Refused("linear-form", "Gemm with a computed bias")
    bias = trace.value(names[2]) * _attribute(node, "beta", 1.0)
    if bias.size not in (1, weight.shape[1]):
        raise Refused("linear-form", "Gemm with a bias per row")
    return weight, np.broadcast_to(bias.reshape(-1), (weight.shape[1],))


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _with_batch(trace: Trace, name: str, optional: bool) -> str:
    """A value with a batch axis that holds the same rows: walks back over reshapes that only merge rows."""
    width, size, start = trace.shape(name)[-1], trace.size(name), name
    while len(trace.shape(name)) < 3:
        node = trace.producer.get(name)
        known = node is not None and node.op_type in ("Reshape", "Identity", "Cast", "Flatten", "Squeeze")
        name = inputs_of(node)[0] if node is not None and known else ""
        if not name or trace.shape(name)[-1:] != (width,) or trace.size(name) != size:
            if optional:
                return start
            raise Refused("no-batch-axis", f"projection input {start!r} has no batch axis")
    return name


def linears_before(trace: Trace, name: str) -> list[ir.Node]:
    """Linear nodes met first when walking back from a value, nearest first."""
    found: list[ir.Node] = []
    seen: set[str] = set()
    stack = [name]
    while stack and len(seen) <= BEYOND_LIMIT:
        value = stack.pop(0)
        node = trace.producer.get(value)
        if value in seen or value in trace.fixed or node is None or not trace.floating(value):
            continue
        seen.add(value)
        if trace.linear(node):
            found.append(node)
        elif not trace.bilinear(node):
            stack += trace.data_inputs(node)
    return found


def comes_from_inputs(trace: Trace, name: str) -> bool:
    """Whether a value is made of graph inputs without passing any linear node or product (a cache)."""
    seen: set[str] = set()
    stack, found = [name], False
    while stack and len(seen) <= BEYOND_LIMIT:
        value = stack.pop()
        if value in seen or value in trace.fixed or not trace.floating(value):
            continue
        seen.add(value)
        node = trace.producer.get(value)
        if node is None:
            found = True
        elif trace.linear(node) or trace.bilinear(node):
            return False
        else:
            stack += trace.data_inputs(node)
    return found
