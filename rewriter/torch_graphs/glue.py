"""What lies around composites, as torch: views, masks and element-wise steps of ONNX, written on fx proxies.

Only what regions are made of; anything else is a `Refused` that leaves its site as it is. Arithmetic on sizes
becomes arithmetic on whole numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import fx
from torch.nn import functional

from rewriter.core.refusal import Refused
from rewriter.graph.tensors import torch_dtype
from rewriter.torch_graphs.terms import Constant, Size, Sizes, Tensorlike, Term, integers

LAST = 2**62  # ends beyond are "to the end"


class Scope(Protocol):
    """What writing a node needs to know around it."""

    def tensor(self, term: Term) -> Tensorlike:
        """The term as a tensor of the graph."""

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Tensorlike:
        """A call of a function as a node of the graph."""

    def rank(self, name: str) -> int:
        """Number of axes of an ONNX value."""

    def width(self, name: str) -> int:
        """Length of the last axis of an ONNX value."""

    def device(self) -> Any:
        """Where new tensors are made."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of an ONNX value."""


Writer = Callable[[Scope, ir.Node, list[Term | None]], Term]
WRITERS: dict[str, Writer] = {}


def writes(*kinds: str) -> Callable[[Writer], Writer]:
    """Register how operators of these kinds are written."""

    def register(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(kinds, function))
        return function

    return register


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    return node.attributes[name].value if name in node.attributes else default


def rank_of(scope: Scope, node: ir.Node, position: int = 0) -> int:
    """Number of axes of an input."""
    value = node.inputs[position]
    assert value is not None
    return scope.rank(str(value.name))


def operand(scope: Scope, term: Term | None) -> Any:
    """A factor or summand: tensors as they are, constants of one number as that number."""
    if isinstance(term, Sizes) and (term.scalar or len(term.items) == 1):
        return term.items[0]
    if isinstance(term, Constant) and term.number is not None and term.array.ndim == 0:
        return term.number
    assert term is not None
    return scope.tensor(term)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Pow": operator.pow,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Equal": operator.eq,
    "MatMul": torch.matmul,
}
_LOGICAL = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}
_ON_SIZES = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "Neg": operator.neg,
    "Sqrt": torch.sqrt,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Exp": torch.exp,
    "Log": torch.log,
    "Abs": torch.abs,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Reciprocal": torch.reciprocal,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "Relu": torch.relu,
    "Softplus": functional.softplus,
    "HardSwish": functional.hardswish,
    "Mish": functional.mish,
    "Floor": torch.floor,
    "Sign": torch.sign,
}


@writes(*_BINARY)
def binary(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Element-wise with broadcasting; on sizes, arithmetic of whole numbers."""
    left, right = terms[0], terms[1]
    if isinstance(left, Sizes) and isinstance(right, Sizes) and node.op_type in _ON_SIZES:
        length = max(len(left.items), len(right.items))
        pairs = zip(*(s.items * (length if len(s.items) == 1 else 1) for s in (left, right)), strict=True)
        return Sizes(tuple(_ON_SIZES[node.op_type](a, b) for a, b in pairs), left.scalar and right.scalar)
    one, other = operand(scope, left), operand(scope, right)
    if not isinstance(one, fx.Proxy) and not isinstance(other, fx.Proxy):
        raise Refused("fx-form", f"{node.op_type} of two numbers")
    whole = node.op_type == "Div" and not scope.dtype(str(node.outputs[0].name)).is_floating_point
    result: Term = (
        scope.call(torch.div, one, other, rounding_mode="trunc")
        if whole
        else scope.call(_BINARY[node.op_type], one, other)
    )
    return result


@writes(*_LOGICAL)
def logical(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Of conditions."""
    one, other = (scope.tensor(_given(term)) for term in terms)
    return scope.call(_LOGICAL[node.op_type], one, other)


@writes(*_UNARY)
def unary(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Element-wise of one tensor."""
    result: Term = scope.call(_UNARY[node.op_type], scope.tensor(_given(terms[0])))
    return result


@writes("Sum", "Max", "Min")
def several(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Sums, and the larger or smaller of tensors."""
    if node.op_type == "Sum":
        result: Term = reduce(operator.add, (operand(scope, term) for term in terms))
        return result
    choose = torch.maximum if node.op_type == "Max" else torch.minimum
    return reduce(partial(scope.call, choose), (scope.tensor(_given(term)) for term in terms))


@writes("Gelu")
def gelu(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """By the error function, or by tanh."""
    approximate = attribute(node, "approximate", "none")
    return scope.call(functional.gelu, scope.tensor(_given(terms[0])), approximate=approximate)


@writes("Clip")
def clip(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Between two numbers."""
    bounds = [None if term is None else operand(scope, term) for term in terms[1:3]]
    return scope.call(torch.clamp, scope.tensor(_given(terms[0])), *bounds)


@writes("Elu", "LeakyRelu")
def sloped(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Activations with one number."""
    alpha = float(attribute(node, "alpha", 1.0 if node.op_type == "Elu" else 0.01))
    function = functional.elu if node.op_type == "Elu" else functional.leaky_relu
    return scope.call(function, scope.tensor(_given(terms[0])), alpha)


@writes("Identity", "Dropout")
def same(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """The input itself."""
    return _given(terms[0])


@writes("Cast")
def cast(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """To another dtype; sizes stay sizes."""
    dtype = torch_dtype(int(attribute(node, "to")))
    if isinstance(terms[0], Sizes) and not dtype.is_floating_point and dtype is not torch.bool:
        return terms[0]
    return scope.tensor(_given(terms[0])).to(dtype)


@writes("Where")
def where(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """One of two by a condition."""
    condition = scope.tensor(_given(terms[0]))
    one, other = (operand(scope, term) for term in terms[1:3])
    chosen = scope.call(torch.where, condition, one, other)
    if isinstance(one, fx.Proxy) or isinstance(other, fx.Proxy):
        return chosen
    return chosen.to(scope.dtype(str(node.outputs[0].name)))


@writes("Shape")
def shape(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """The sizes of a tensor."""
    rank, tensor = rank_of(scope, node), scope.tensor(_given(terms[0]))
    start, end = attribute(node, "start", 0), attribute(node, "end", rank)
    return Sizes(tuple(tensor.size(axis) for axis in range(rank)[start:end]))


@writes("Concat")
def concat(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Tensors along an axis; vectors of sizes one after the other."""
    parts = [_given(term) for term in terms]
    vectors = [part for part in parts if isinstance(part, Sizes)]
    if len(vectors) == len(parts):
        return Sizes(tuple(item for part in vectors for item in part.items))
    return scope.call(torch.cat, [scope.tensor(part) for part in parts], attribute(node, "axis"))


@writes("Squeeze", "Unsqueeze")
def axes(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Axes of length one, taken or given."""
    given = integers(terms[1]) if len(terms) > 1 else [int(axis) for axis in attribute(node, "axes", ())]
    first = _given(terms[0])
    if isinstance(first, Sizes):
        if len(first.items) != 1:
            raise Refused("fx-form", "a vector of sizes becomes a matrix")
        return Sizes(first.items, node.op_type == "Squeeze")
    tensor, rank = scope.tensor(first), scope.rank(str(node.outputs[0].name))
    if node.op_type == "Squeeze":
        return tensor.squeeze(tuple(given)) if given else tensor.squeeze()
    for axis in sorted(axis % rank for axis in given):
        tensor = tensor.unsqueeze(axis)
    return tensor


@writes("Reshape", "Flatten")
def reshape(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """To sizes, of which 0 copies an axis and -1 is what is left."""
    first = _given(terms[0])
    if node.op_type == "Flatten":
        raise Refused("fx-form", "Flatten")
    sizes = _sizes(terms[1])
    if isinstance(first, Sizes):
        return Sizes(first.items, not sizes)
    tensor, zero = scope.tensor(first), not attribute(node, "allowzero", 0)
    copied = [tensor.size(i) if zero and isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    return tensor.reshape(copied)


@writes("Transpose")
def transpose(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Axes in another order."""
    order = attribute(node, "perm") or range(rank_of(scope, node))[::-1]
    return scope.tensor(_given(terms[0])).permute([int(axis) for axis in order])


@writes("Expand")
def expand(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Broadcast in both directions."""
    sizes, first = _sizes(terms[1]), _given(terms[0])
    if isinstance(first, Constant) and first.number is not None and len(sizes) >= first.array.ndim:
        dtype = scope.dtype(str(node.outputs[0].name))
        return scope.call(torch.full, sizes, first.number, dtype=dtype, device=scope.device())
    tensor, rank = scope.tensor(first), rank_of(scope, node)
    if len(sizes) < rank:
        raise Refused("fx-form", "a tensor is expanded to fewer axes than it has")
    extra = len(sizes) - rank
    kept = [-1 if isinstance(s, int) and s == 1 and place >= extra else s for place, s in enumerate(sizes)]
    return tensor.expand(kept)


@writes("Slice")
def cut(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """A part of every named axis."""
    first = _given(terms[0])
    starts, ends = (_sizes(term) for term in terms[1:3])
    given = terms[3] if len(terms) > 3 else None
    named = integers(given) if given is not None else list(range(len(starts)))
    steps = integers(terms[4]) if len(terms) > 4 and terms[4] is not None else [1] * len(named)
    if any(step < 1 for step in steps):
        raise Refused("fx-form", "a slice runs backwards")
    bounds = zip(starts, [None if isinstance(e, int) and e > LAST else e for e in ends], steps, strict=True)
    pieces: list[Any] = [slice(*bound) for bound in bounds]
    if isinstance(first, Sizes):
        return Sizes(first.items[pieces[0]])
    tensor, rank = scope.tensor(first), rank_of(scope, node)
    index: list[Any] = [slice(None)] * rank
    for axis, piece in zip(named, pieces, strict=True):
        index[axis % rank] = piece
    return tensor[tuple(index)]


@writes("Gather")
def gather(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Places along an axis."""
    first, axis = _given(terms[0]), int(attribute(node, "axis", 0))
    if isinstance(first, Sizes):
        picked = tuple(first.items[place] for place in integers(terms[1]))
        return Sizes(picked, isinstance(terms[1], Sizes) and terms[1].scalar)
    tensor = scope.tensor(first)
    axis %= rank_of(scope, node)
    if isinstance(terms[1], Sizes) and terms[1].scalar:
        return tensor.select(axis, terms[1].items[0])
    lead = (slice(None),) * axis
    if isinstance(terms[1], Sizes):
        return tensor[(*lead, list(terms[1].items))]
    return tensor[(*lead, scope.tensor(_given(terms[1])))]


@writes("Range")
def arange(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Numbers in even steps."""
    bounds = [operand(scope, term) for term in terms]
    return scope.call(torch.arange, *bounds, device=scope.device())


@writes("ConstantOfShape")
def filled(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """One number everywhere."""
    value = attribute(node, "value")
    number = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    dtype = scope.dtype(str(node.outputs[0].name))
    return scope.call(torch.full, _sizes(terms[0]), number, dtype=dtype, device=scope.device())


def _given(term: Term | None) -> Term:
    if term is None:
        raise Refused("fx-form", "an operand is missing")
    return term


def _sizes(term: Term | None) -> list[Size]:
    if not isinstance(term, Sizes):
        raise Refused("fx-form", "sizes are computed from data")
    return list(term.items)
