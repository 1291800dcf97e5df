"""Operands of an attention product: where queries, keys and values enter, whatever axis order the product uses."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.trace import Trace, inputs_of, outputs_of
from rewriter.core.refusal import Refused
from rewriter.core.site import Array


@dataclass(frozen=True)
class Operand:
    """A value and how to read it as (lead..., tokens, dim).

    With `split` > 0 the last axis of a (batch, tokens, split * dim) value is cut into that many heads. `axes` then
    permutes, `new` says where axes of length one come in after that, and `lead` is the shape the leading axes broadcast
    to inside the product. With `heads_first` the one leading axis counts heads first, then that many batch items.
    """

    name: str
    axes: tuple[int, ...]
    lead: tuple[int, ...]
    split: int = 0
    part: tuple[int, int] | None = None  # (axis, index) picked first: one of several operands packed in a value
    heads: tuple[int, int] | None = None  # the range of heads that belong to this operand, after `split`
    new: tuple[int, ...] = ()
    heads_first: int = 0

    def arrange(self, array: Array) -> Array:
        """An array of the value's shape as (lead..., tokens, dim), broadcast as the product would."""
        if self.part is not None:
            array = np.take(array, self.part[1], self.part[0])
        if self.split:
            array = array.reshape(*array.shape[:-1], self.split, array.shape[-1] // self.split)
        if self.heads is not None:
            array = array[..., self.heads[0] : self.heads[1], :]
        array = np.expand_dims(np.transpose(array, self.axes), self.new)
        array = np.broadcast_to(array, (*self.lead, *array.shape[-2:]))
        if not self.heads_first:
            return array
        return array.reshape(-1, self.heads_first, *array.shape[-2:]).swapaxes(0, 1).reshape(array.shape)

    def swapped(self) -> Operand:
        """The same value with its last two axes read the other way round."""
        return replace(self, axes=(*self.axes[:-2], self.axes[-1], self.axes[-2]))

    @property
    def transposed(self) -> bool:
        """Whether the value is a four-dimensional (batch, heads, dim, tokens)."""
        return self.axes == (0, 1, 3, 2) and not self.split and self.part is None and not self.new

    @property
    def straight(self) -> bool:
        """Whether the value is a four-dimensional (batch, heads, tokens, dim)."""
        return self.axes == (0, 1, 2, 3) and not self.split and self.part is None and not self.new


@dataclass(frozen=True)
class Product:
    """A product of two activations: left (lead..., rows, inner) times right (lead..., inner, columns).

    `left` is read as (lead, rows, inner), `right` as (lead, columns, inner); `result` as (lead, rows, columns), times
    `factor`.
    """

    node: ir.Node
    left: Operand
    right: Operand
    result: Operand
    factor: float = 1.0

    def columns_first(self) -> Product:
        """The same product with left and right exchanged, its result read as (lead, columns, rows)."""
        return replace(self, left=self.right, right=self.left, result=self.result.swapped())


def matrix_product(trace: Trace, node: ir.Node) -> Product:
    """Left and right operand of a MatMul or of an Einsum that is one; raises `Refused` for anything else."""
    if node.op_type == "Einsum":
        return _einsum_product(trace, node)
    left, right = inputs_of(node)
    a, b = len(trace.shape(left)), len(trace.shape(right))
    if min(a, b) < 2:
        raise Refused("product-form", "a product with a vector")
    result = outputs_of(node)[0]
    lead = trace.shape(result)[:-2]
    product = Operand(result, tuple(range(max(a, b))), lead)
    first = Operand(left, _order(node, "A", a), lead, new=tuple(range(b - a)))
    second = Operand(right, _order(node, "B", b), lead, new=tuple(range(a - b)))
    factor = float(node.attributes["alpha"].value) if "alpha" in node.attributes else 1.0
    return Product(node, first, second.swapped(), product, factor)


def _order(node: ir.Node, side: str, rank: int) -> tuple[int, ...]:
    """The axes of an operand as the product reads them: FusedMatMul may take rows first, and matrices transposed."""

    def flag(name: str) -> bool:
        return name in node.attributes and bool(node.attributes[name].value)

    axes = (*range(1, rank - 1), 0, rank - 1) if flag(f"transBatch{side}") else tuple(range(rank))
    return (*axes[:-2], axes[-1], axes[-2]) if flag(f"trans{side}") else axes


def _einsum_product(trace: Trace, node: ir.Node) -> Product:
    """Axes that only one operand has are shared too, but for the last of each in the result: rows and columns."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "->" not in equation:
        raise Refused("product-form", f"einsum {equation}")
    left, right, result = _spelled_out(equation, [len(trace.shape(name)) for name in inputs_of(node)])
    rows = [c for c in result if c in left and c not in right][-1:]
    columns = [c for c in result if c in right and c not in left][-1:]
    shared = [c for c in result if c not in (*rows, *columns)]
    inner = [c for c in left if c in right and c not in result]
    plain = all(len(set(term)) == len(term) for term in (left, right, result))
    kept = {*shared, *rows, *columns, *inner} == {*left, *right}
    if not plain or not kept or any(len(part) != 1 for part in (rows, columns, inner)):
        raise Refused("product-form", f"einsum {equation}")
    names, shapes = inputs_of(node), [trace.shape(name) for name in inputs_of(node)]
    sizes = dict(zip(left + right, (*shapes[0], *shapes[1]), strict=True))
    lead = tuple(sizes[c] for c in shared)

    def operand(name: str, term: str, last: list[str]) -> Operand:
        axes = tuple(term.index(c) for c in [*shared, *last] if c in term)
        return Operand(name, axes, lead, new=tuple(i for i, c in enumerate(shared) if c not in term))

    return Product(
        node,
        operand(names[0], left, [*rows, *inner]),
        operand(names[1], right, [*columns, *inner]),
        operand(outputs_of(node)[0], result, [*rows, *columns]),
    )


def _spelled_out(equation: str, ranks: Sequence[int]) -> tuple[str, str, str]:
    """The terms of an equation of two operands, with letters in place of dots."""
    terms, result = equation.split("->")
    left, right = terms.split(",")
    hidden = max((rank - len(t) + 3 for t, rank in zip((left, right), ranks, strict=True) if "..." in t), default=0)
    free = [c for c in string.ascii_letters if c not in equation][:hidden]

    def spelled(term: str, rank: int) -> str:
        dots = rank - len(term) + 3
        return term.replace("...", "".join(free[len(free) - dots :] if dots else ""))

    return spelled(left, ranks[0]), spelled(right, ranks[1]), result.replace("...", "".join(free))


def slots(operand: Operand, array: Array, batch: int) -> Array:
    """(batch, heads, tokens, dim) of an operand's value; raises `Refused` if its slots are no multiple of batch."""
    arranged = operand.arrange(array)
    count = int(np.prod(operand.lead))
    if count % batch:
        raise Refused("folded-axes", f"{count} slots for a batch of {batch}")
    return arranged.reshape(batch, count // batch, *arranged.shape[-2:])


def four_dimensional(shape: Sequence[int]) -> bool:
    """Whether a shape can be (batch, heads, tokens, dim)."""
    return len(shape) == 4
