"""Attention whose products are written as multiplications and sums, as over unfolded windows: named, not raised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.attention.readers import AFTER_SOFTMAX, BEFORE_SOFTMAX, products_before, readers_of
from rewriter.attention.trace import VIEWS, Trace, close, inputs_of, label, outputs_of
from rewriter.core.refusal import Refused


def refuse_written_out(trace: Trace, node: ir.Node) -> None:
    """Raise `Refused` for a softmax between two products of activations, one at least of which is no matrix product."""
    scores, probabilities = inputs_of(node)[0], outputs_of(node)[0]
    before = bool(products_before(trace, scores)[0]) or _summed_before(trace, scores)
    if before and (readers_of(trace, probabilities)[0] or _summed_after(trace, probabilities)):
        why = "products of queries, keys and values are written as multiplications and sums"
        raise Refused("product-form", why, (label(node),))


def _multiplies(trace: Trace, node: ir.Node | None) -> bool:
    """Whether a node multiplies two activations, entry by entry."""
    if node is None or node.op_type != "Mul" or node.domain:
        return False
    names = inputs_of(node)
    return names[0] != names[1] and not any(name in trace.shaped for name in names)


def _summed_before(trace: Trace, scores: str) -> bool:
    stack, seen = [scores], set()
    while stack:
        name = stack.pop()
        node = trace.producer.get(name)
        if name in seen or node is None or name in trace.shaped:
            continue
        seen.add(name)
        if node.op_type == "ReduceSum":
            if _multiplies(trace, trace.producer.get(inputs_of(node)[0])):
                return True
        elif node.op_type in BEFORE_SOFTMAX:
            stack += trace.data_inputs(node)
    return False


def _summed_after(trace: Trace, probabilities: str) -> bool:
    """Whether values are weighed by the probabilities and summed over what these share out: ones would give ones."""
    stack, seen = [(probabilities, "")], set[tuple[str, str]]()
    while stack:
        entry = stack.pop()
        if entry in seen:
            continue
        seen.add(entry)
        name, values = entry
        for node in trace.consumers[name]:
            if node.op_type == "ReduceSum" and values and _shares(trace, values, outputs_of(node)[0]):
                return True
            if node.op_type in (VIEWS if values else AFTER_SOFTMAX):
                other = next((i for i in inputs_of(node) if i != name), "") if _multiplies(trace, node) else values
                stack += [(output, other) for output in outputs_of(node)]
    return False


def _shares(trace: Trace, values: str, total: str) -> bool:
    probed = trace.probe(values, total, [np.ones(trace.shape(values))])
    return probed is not None and close(probed[0], np.ones_like(probed[0]))
