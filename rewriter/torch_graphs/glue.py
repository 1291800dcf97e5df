"""What lies around composites, as torch: element-wise steps of ONNX, written on fx proxies; views are in `views`.

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
from rewriter.torch_graphs.terms import Constant, Sizes, Tensorlike, Term


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


# One term, or a list of one per output.
Writer = Callable[[Scope, ir.Node, list[Term | None]], Term | list[Term]]
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
    one, other = (scope.tensor(given(term)) for term in terms)
    return scope.call(_LOGICAL[node.op_type], one, other)


@writes(*_UNARY)
def unary(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Element-wise of one tensor."""
    result: Term = scope.call(_UNARY[node.op_type], scope.tensor(given(terms[0])))
    return result


@writes("Sum", "Max", "Min")
def several(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Sums, and the larger or smaller of tensors."""
    if node.op_type == "Sum":
        result: Term = reduce(operator.add, (operand(scope, term) for term in terms))
        return result
    choose = torch.maximum if node.op_type == "Max" else torch.minimum
    return reduce(partial(scope.call, choose), (scope.tensor(given(term)) for term in terms))


@writes("Gelu")
def gelu(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """By the error function, or by tanh."""
    approximate = attribute(node, "approximate", "none")
    return scope.call(functional.gelu, scope.tensor(given(terms[0])), approximate=approximate)


@writes("Clip")
def clip(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Between two numbers."""
    bounds = [None if term is None else operand(scope, term) for term in terms[1:3]]
    return scope.call(torch.clamp, scope.tensor(given(terms[0])), *bounds)


@writes("Elu", "LeakyRelu")
def sloped(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Activations with one number."""
    alpha = float(attribute(node, "alpha", 1.0 if node.op_type == "Elu" else 0.01))
    function = functional.elu if node.op_type == "Elu" else functional.leaky_relu
    return scope.call(function, scope.tensor(given(terms[0])), alpha)


@writes("Identity", "Dropout")
def same(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """The input itself."""
    return given(terms[0])


@writes("Cast")
def cast(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """To another dtype; sizes stay sizes."""
    dtype = torch_dtype(int(attribute(node, "to")))
    if isinstance(terms[0], Sizes) and not dtype.is_floating_point and dtype is not torch.bool:
        return terms[0]
    return scope.tensor(given(terms[0])).to(dtype)


@writes("Where")
def where(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """One of two by a condition."""
    condition = scope.tensor(given(terms[0]))
    one, other = (operand(scope, term) for term in terms[1:3])
    chosen = scope.call(torch.where, condition, one, other)
    if isinstance(one, fx.Proxy) or isinstance(other, fx.Proxy):
        return chosen
    return chosen.to(scope.dtype(str(node.outputs[0].name)))


def given(term: Term | None) -> Term:
    """The operand; raises `Refused` if it is missing."""
    if term is None:
        raise Refused("fx-form", "an operand is missing")
    return term
