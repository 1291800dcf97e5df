"""Anchors: softmaxes that may be attention, and the products around them. Candidates only, nothing is decided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.attention.trace import SHAPES, Trace, close, inputs_of, label, outputs_of
from rewriter.core.refusal import Refused

AFTER_SOFTMAX = frozenset(
    [
        "Cast",
        "Identity",
        "Dropout",
        "Where",
        "Mul",
        "Div",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Add",
        "Split",
        "Concat",
        "Gather",
        "Clip",
        "Expand",
        "Flatten",
    ]
)
BEFORE_SOFTMAX = frozenset(
    [
        "Add",
        "Sum",
        "Sub",
        "Mul",
        "Div",
        "Where",
        "Tanh",
        "Cast",
        "Identity",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Max",
        "Min",
        "Clip",
        "Concat",
        "Expand",
        "Slice",
        "Pad",
        "GatherElements",
        "Neg",
        "Split",
        "ScatterND",
        "Flatten",
        "Gather",
    ]
)


@dataclass(frozen=True)
class Reader:
    """A product that reads the probabilities: the node, at which input, and under which name they arrive."""

    node: ir.Node
    position: int
    consumed: str


@dataclass(frozen=True)
class Anchor:
    """A softmax with candidate content products before it and one product with values after it.

    With `turned` the softmax runs over the second axis from the end: keys come first in the scores.
    """

    node: ir.Node
    scores: str
    probabilities: str
    candidates: tuple[ir.Node, ...]
    reader: Reader
    turned: bool = False


def softmax_values(trace: Trace, node: ir.Node) -> tuple[str, str] | None:
    """(scores, probabilities) of a Softmax node, or of a quotient Exp / ReduceSum that is one; None for other nodes.

    A maximum subtracted from the scores changes nothing and is skipped.
    """
    probabilities = outputs_of(node)[0] if outputs_of(node) else ""
    if node.op_type == "Softmax" and not node.domain:
        return _without_maximum(trace, inputs_of(node)[0]), probabilities
    if node.op_type != "Div":
        return None
    top, bottom = (trace.producer.get(name) for name in inputs_of(node))
    if top is None or bottom is None or (top.op_type, bottom.op_type) != ("Exp", "ReduceSum"):
        return None
    if inputs_of(bottom)[0] != outputs_of(top)[0] or len(trace.shape(probabilities)) < 3:
        return None
    if not close(trace.value(probabilities).sum(-1), np.ones(trace.shape(probabilities)[:-1])):
        return None
    return _without_maximum(trace, inputs_of(top)[0]), probabilities


def _without_maximum(trace: Trace, scores: str) -> str:
    node = trace.producer.get(scores)
    if node is None or node.op_type != "Sub":
        return scores
    before, maximum = inputs_of(node)
    behind = trace.producer.get(maximum)
    own = behind is not None and behind.op_type == "ReduceMax" and inputs_of(behind)[0] == before
    return before if own and trace.shape(maximum)[-1:] == (1,) else scores


def softmax_anchor(trace: Trace, node: ir.Node, scores: str, probabilities: str) -> Anchor | None:
    """The anchor at a softmax; None if it is no attention, `Refused` if it looks like one but is not understood."""
    rank = len(trace.shape(scores))
    if rank < 3:
        return None
    readers, linears_after = readers_of(trace, probabilities)
    terms, linears_before = products_before(trace, scores)
    mixed = [n for n in linears_after for _ in readers_of(trace, outputs_of(n)[0])[0][:1]] if not readers else []
    if not readers and not mixed:
        return None
    mixers = [n for n in linears_before if trace.linear(n) and _behind(trace, n)] if not terms else []
    if not terms and not mixers:
        return None
    if mixed or mixers:
        nodes = tuple(label(n) for n in (*mixed, *mixers))
        raise Refused("head-mixing", "a linear map mixes heads between scores and values", nodes)
    default = -1 if trace.graph.opset >= 13 or node.op_type != "Softmax" else 1
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else default
    if axis % rank not in (rank - 1, rank - 2):
        raise Refused("softmax-axis", f"softmax over axis {axis} of {rank}", (label(node),))
    if len(readers) != 1:
        nodes = tuple(label(r.node) for r in readers)
        raise Refused("several-readers", "the probabilities enter several products", nodes)
    return Anchor(node, scores, probabilities, tuple(terms), readers[0], axis % rank == rank - 2)


def _behind(trace: Trace, linear: ir.Node) -> bool:
    found = trace.linear(linear)
    assert found is not None
    return bool(products_before(trace, inputs_of(linear)[found[0]])[0])


def readers_of(trace: Trace, probabilities: str) -> tuple[list[Reader], list[ir.Node]]:
    """(products of two activations that read the probabilities, linear nodes met on the way)."""
    readers: list[Reader] = []
    linears: list[ir.Node] = []
    stack, seen = [probabilities], set()
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in trace.consumers[name]:
            if trace.bilinear(node):
                readers.append(Reader(node, inputs_of(node).index(name), name))
            elif trace.linear(node):
                linears.append(node)
            elif node.op_type in AFTER_SOFTMAX and trace.floating(name):
                stack += outputs_of(node)
    return readers, linears


def products_before(trace: Trace, scores: str) -> tuple[list[ir.Node], list[ir.Node]]:
    """(products of two activations that feed the scores, linear nodes met on the way)."""
    products: list[ir.Node] = []
    linears: list[ir.Node] = []
    stack, seen = [scores], set()
    while stack:
        name = stack.pop()
        node = trace.producer.get(name)
        if name in seen or node is None or name in trace.shaped or not trace.floating(name):
            continue
        seen.add(name)
        if trace.bilinear(node):
            products.append(node)
        elif trace.linear(node):
            linears.append(node)
        elif node.op_type in BEFORE_SOFTMAX:
            stack += trace.data_inputs(node)
    return products, linears


def read_elsewhere(trace: Trace, name: str, output: str) -> tuple[str, ...]:
    """Graph outputs that depend on a value by a way that does not pass the region's output."""
    seen, stack = set(), [name]
    while stack:
        value = stack.pop()
        if value in seen or value == output:
            continue
        seen.add(value)
        stack += [o for node in trace.consumers[value] if node.op_type not in SHAPES for o in outputs_of(node)]
    return tuple(sorted(seen & trace.outputs))
