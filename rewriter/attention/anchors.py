"""Anchors: softmaxes that may be attention, and the products around them. Candidates only, nothing is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from rewriter.attention.readers import Reader, products_before, readers_of
from rewriter.attention.softmaxes import Softmax, read_softmax
from rewriter.attention.trace import Trace, inputs_of, label, outputs_of
from rewriter.core.refusal import Refused

SOFTMAXES = frozenset(("Softmax", "LogSoftmax"))
WRITTEN = frozenset(("Exp",))  # a softmax may be written with it
OTHER = frozenset(("Relu", "Sigmoid", "Pow"))  # what attention without a softmax of base e makes of its scores


@dataclass(frozen=True)
class Anchor:
    """A softmax with candidate content products before it and one product with values after it."""

    node: ir.Node
    softmax: Softmax
    probabilities: str
    candidates: tuple[ir.Node, ...]
    reader: Reader


@dataclass(frozen=True)
class Surroundings:
    """The products around a node that may be a softmax: before the scores, and with the values.

    `mixers` are linear nodes that lie between the products.
    """

    node: ir.Node
    terms: tuple[ir.Node, ...]
    readers: tuple[Reader, ...]
    mixers: tuple[ir.Node, ...] = field(default=())

    @property
    def softmax(self) -> bool:
        """Whether the node is a softmax by its operator."""
        return self.node.op_type in SOFTMAXES


def surroundings(trace: Trace, node: ir.Node) -> Surroundings | None:
    """The products around a node, if there are such on both sides of it; None otherwise."""
    if node.domain or node.op_type not in WRITTEN | OTHER | SOFTMAXES or not outputs_of(node):
        return None
    if node.op_type == "Pow" and inputs_of(node)[0] not in trace.fixed:
        return None  # a power of the data, not of a constant base
    exponentials = node.op_type == "LogSoftmax"
    readers, after = readers_of(trace, outputs_of(node)[0], exponentials, node.op_type in SOFTMAXES)
    terms, before = products_before(trace, inputs_of(node)[exponent(node)]) if readers or after else ([], [])
    mixers: list[ir.Node] = []
    if not readers:
        mixers = [n for n in after if readers_of(trace, outputs_of(n)[0])[0]][:1]
        readers = readers_of(trace, outputs_of(mixers[0])[0])[0] if mixers else []
    if not terms:
        found = [n for n in before if products_before(trace, _data(trace, n))[0]][:1]
        terms = products_before(trace, _data(trace, found[0]))[0] if found else []
        mixers += found
    if not readers or not terms or (mixers and node.op_type not in SOFTMAXES):
        return None
    return Surroundings(node, tuple(terms), tuple(readers), tuple(mixers))


def exponent(node: ir.Node) -> int:
    """The position of the scores among the inputs of a node that may be a softmax."""
    return 1 if node.op_type == "Pow" else 0


def softmax_anchor(trace: Trace, around: Surroundings) -> Anchor:
    """The anchor at a softmax between products; `Refused` if it is not understood."""
    if around.mixers:
        nodes = tuple(map(label, around.mixers))
        raise Refused("head-mixing", "a linear map mixes heads between scores and values", nodes)
    if around.node.op_type in OTHER:
        raise Refused("no-softmax", f"{around.node.op_type} in place of a softmax", (label(around.node),))
    if len(around.readers) != 1:
        nodes = tuple(label(r.node) for r in around.readers)
        raise Refused("several-readers", "the probabilities enter several products", nodes)
    reader = around.readers[0]
    softmax = read_softmax(trace, around.node, reader)
    terms, _ = products_before(trace, softmax.scores)
    return Anchor(around.node, softmax, outputs_of(around.node)[0], tuple(terms), reader)


def _data(trace: Trace, linear: ir.Node) -> str:
    found = trace.linear(linear)
    assert found is not None
    return inputs_of(linear)[found[0]]
