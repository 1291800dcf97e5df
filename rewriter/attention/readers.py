"""Walks around a softmax: products that read its probabilities, products that feed its scores. Candidates only."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rewriter.attention.trace import SHAPES, Trace, inputs_of, outputs_of

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
        "Pad",
    ]
)
DIFFERENCES = frozenset(("Sub", "Neg", "Sum"))
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
        "ScatterElements",
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


def readers_of(
    trace: Trace, probabilities: str, exponentials: bool = False, differences: bool = False
) -> tuple[list[Reader], list[ir.Node]]:
    """(products of two activations that read the probabilities, linear nodes met on the way).

    With `exponentials` what is given are logarithms, and the way goes on through their exponential; with `differences`
    it goes on where one softmax is taken from another.
    """
    passed = AFTER_SOFTMAX | {"Exp"} if exponentials else AFTER_SOFTMAX
    passed = passed | DIFFERENCES if differences else passed
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
            elif node.op_type in passed and trace.floating(name):
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
