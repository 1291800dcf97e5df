"""Attention inside If, Loop and Scan: named, so that nothing is skipped in silence, but not taken apart."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from rewriter.attention.trace import PRODUCTS, label
from rewriter.core.refusal import Refusal
from rewriter.core.site import Unrecognised
from rewriter.graph.onnx import OnnxGraph


def inside_control_flow(graph: OnnxGraph) -> tuple[Unrecognised, ...]:
    """Every attention operator, and every softmax between two products, in a subgraph of the model."""
    return tuple(_found(graph.model.graph, inside=False))


def _found(graph: ir.Graph, inside: bool) -> Iterator[Unrecognised]:
    for node in graph:
        if inside and (node.op_type.endswith("Attention") or _between_products(node)):
            why = "attention inside control flow is not rewritten"
            yield Unrecognised(label(node), Refusal("inside-control-flow", why, (label(node),)))
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _found(attribute.as_graph(), True)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _found(body, True)


def _between_products(node: ir.Node) -> bool:
    return node.op_type == "Softmax" and _reaches(node, forward=True) and _reaches(node, forward=False)


def _reaches(start: ir.Node, forward: bool) -> bool:
    """Whether a product of two activations lies before (or after) a node, in the same graph."""
    stack, seen = [start], {id(start)}
    while stack:
        node = stack.pop()
        if (
            node is not start
            and node.op_type in PRODUCTS
            and all(v is not None and not v.is_initializer() for v in node.inputs)
        ):
            return True
        if forward:
            near = [usage.node for value in node.outputs for usage in value.uses()]
        else:
            near = [one for value in node.inputs if value is not None and (one := value.producer()) is not None]
        for other in near:
            if id(other) not in seen and other.graph is start.graph:
                seen.add(id(other))
                stack.append(other)
    return False
