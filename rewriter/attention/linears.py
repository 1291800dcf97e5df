"""Linear nodes: which weights they multiply by, and where their input has its batch axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.attention.linear_forms import read_form
from rewriter.attention.recipes import Ledger, Recipe, pick, stored
from rewriter.attention.trace import Trace, inputs_of, label, outputs_of
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
    channels_first: bool  # data and result are (B, channels, tokens...)
    ledger: Ledger | None  # where cuts from a drawn weight are noted; None if the weight is the model's own

    def channels_last(self, element: Array) -> Array:
        """Places in the result as places in (rows, N)."""
        return self._moved(element, self.weight_CN.shape[1])

    def rows_last(self, element: Array) -> Array:
        """What the data reads, laid out as (rows, C)."""
        if not self.channels_first:
            return element
        return element.reshape(self.rows[0], self.weight_CN.shape[0], -1).transpose(0, 2, 1)

    def _moved(self, element: Array, width: int) -> Array:
        if not self.channels_first:
            return element
        batch, channel, token = np.unravel_index(element, (self.rows[0], width, self.rows[1]))
        return np.asarray((batch * self.rows[1] + token) * width + channel)

    def columns(self, order: Array, factor: float = 1.0) -> Array:
        """``factor * weight_CN[:, order]``."""
        return self._cut(1, order, factor)

    def rows_of(self, order: Array, factor: float = 1.0) -> Array:
        """``factor * weight_CN[order]``."""
        return self._cut(0, order, factor)

    def scaled(self, array: Array, factor: float | Array) -> Array:
        """A cut times a factor, or times factors that broadcast to it."""
        result = np.float64(factor) * array
        if self.ledger is None:
            return stored(result, array.dtype)
        self.ledger[id(result)] = result, self.ledger[id(array)][1].times(factor)
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
    form = None if found is None else read_form(trace, node, *found)
    if form is None:
        raise Refused("linear-form", f"linear {node.op_type}", (label(node),))
    data = form.data if batched is False or form.channels_first else _with_batch(trace, form.data, batched is None)
    shape = trace.shape(data)
    lead = shape[: len(shape) - form.contracted] if not form.channels_first else (shape[0], *shape[2:])
    if batched is not False and form.contracted > 1:
        raise Refused("linear-form", "a projection that contracts several axes", (label(node),))
    return Linear(
        node,
        outputs_of(node)[0],
        data,
        (lead[0], int(np.prod(lead[1:]))),
        len(lead) + 1,
        form.weight_CN,
        form.bias_N,
        trace.original_initializer(form.weight),
        trace.original_initializer(form.bias) if form.bias_N is not None else "",
        trace.weight_dtype(form.weight),
        form.weight,
        form.transposed,
        form.alpha,
        form.channels_first,
        trace.recipes if trace.drawn(form.weight) else None,
    )


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
