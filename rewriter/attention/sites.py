"""One anchor becomes one raised site: operands, scores, output, classification. Nothing of the graph is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from rewriter.attention.anchors import SOFTMAXES, Anchor, softmax_anchor, surroundings
from rewriter.attention.cores import Core, assemble, raise_operands, values_product
from rewriter.attention.folding import in_item_order
from rewriter.attention.fused import is_fused, read_fused
from rewriter.attention.loops import Loop, Part, loop_around, merged
from rewriter.attention.operands import Product, matrix_product
from rewriter.attention.projections import raise_operand, scaled_per_head
from rewriter.attention.rough import rough_site
from rewriter.attention.scores import ScoreFunction, bias_in_order, read_bias, read_scores, read_shares, tidy
from rewriter.attention.softmaxes import mixing_weights
from rewriter.attention.trace import Trace, close, label, outputs_of
from rewriter.attention.written_out import refuse_written_out
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, AttentionSite


def raise_softmax(trace: Trace, node: ir.Node) -> AttentionSite | None:
    """The site around a softmax, however it is written; None if it is no attention.

    What is attention and cannot be lowered is a site with the reason among its problems. Raises `Refused` for a
    softmax operator between products of which no more is known.
    """
    around = surroundings(trace, node)
    if around is None:
        if not node.domain and node.op_type in SOFTMAXES and outputs_of(node):
            refuse_written_out(trace, node)
        return None
    try:
        core, raised = _understood(trace, softmax_anchor(trace, around))
    except Refused as problem:
        site = rough_site(trace, around, problem.refusal)
        if site is None and around.softmax:
            raise
        return site
    loop = loop_around(trace, core.context.name)
    if loop is None:
        return assemble(trace, core, raised)
    if loop.joined not in trace.loops:
        trace.loops[loop.joined] = (label(node), _looped(trace, loop))
    first, site = trace.loops[loop.joined]
    if site is None:
        return assemble(trace, core, raised)
    return site if first == label(node) else None


def _looped(trace: Trace, loop: Loop) -> AttentionSite | None:
    """All heads of a loop as one site; None if they stay apart."""

    def part_of(node: ir.Node) -> Part:
        around = surroundings(trace, node)
        if around is None:
            raise Refused("loop-of-heads", "not every part is an attention", (label(node),))
        return _understood(trace, softmax_anchor(trace, around))

    try:
        return assemble(trace, *merged(trace, loop, part_of))
    except Refused:
        return None


def _understood(trace: Trace, anchor: Anchor) -> Part:
    node, softmax = anchor.node, anchor.softmax
    product, function = _content(trace, anchor)
    value, context = values_product(trace, anchor.reader)
    exchanged = softmax.turned != function.swapped
    query, key = (product.right, product.left) if exchanged else (product.left, product.right)
    (query, key, value), context = in_item_order(trace, (query, key, value), context)
    raised = raise_operands(trace, query, key, value)
    heads = len(raised[0].projection.head_of)
    if function.slopes is not None:
        raised = (scaled_per_head(raised[0], _per_head(function.slopes, heads)), *raised[1:])
    name, offset = product.result.name, function.offset
    bias = read_bias(trace, name, softmax.scores, heads, offset)
    if softmax.hides:
        bias, offset = read_shares(trace, name, mixing_weights(trace, anchor.reader), heads)
    bias, steps = bias_in_order(trace, bias) if softmax.turned else (bias, ())
    unclear = (softmax.turned and bias.kind == "path") or (function.swapped and bias.full_shape)
    why = Refusal("softmax-axis", "what is added to the scores has keys before queries", (label(node),))
    core = Core(
        query,
        key,
        value,
        context,
        function.slope * product.factor,
        function.softcap,
        bias,
        offset.swapaxes(-1, -2) if softmax.turned else offset,
        _empty_rows(trace, anchor),
        anchor.probabilities,
        (product.node, node, anchor.reader.node),
        (name, anchor.probabilities, context.name),
        problems=(why,) if unclear else (),
        before=steps,
        sink_H=None if softmax.sink is None else _sink(softmax.sink, raised[0].batch, heads),
        content=("", "") if softmax.turned or function.swapped else (name, softmax.scores),
    )
    return core, raised


def _per_head(slopes: Array, heads: int) -> tuple[float, ...]:
    """One factor for each head, the same for every batch item."""
    rows = slopes.reshape(-1, heads)
    if not close(rows, np.broadcast_to(rows[:1], rows.shape), 1e-8):
        raise Refused("scale-per-item", "batch items are scaled differently")
    return tuple(tidy(float(factor)) for factor in rows[0])


def _sink(logits: Array, batch: int, heads: int) -> Array:
    """One logit for each head, the same for every query."""
    rows = logits.reshape(batch, heads, -1)
    if not close(np.exp(rows - rows[:1, :, :1]), np.ones_like(rows), 1e-8):
        raise Refused("sink-per-token", "what the softmax holds beside its keys differs between queries")
    return np.array([tidy(float(logit)) if abs(logit) > 1e-12 else 0.0 for logit in rows[0, :, 0]])


def _content(trace: Trace, anchor: Anchor) -> tuple[Product, ScoreFunction]:
    """The one product the scores are an element-wise function of; position terms fail that test."""
    found, why = [], Refused("no-content-term", "no product of queries and keys reaches the scores")
    for node in anchor.candidates:
        try:
            found.append((node, read_scores(trace, outputs_of(node)[0], anchor.softmax.scores, anchor.softmax.hides)))
        except Refused as problem:
            why = problem
    if len(found) > 1:
        found = [entry for entry in found if _of_one_source(trace, anchor, entry[0])] or found
    if len(found) > 1:
        nodes = tuple(label(node) for node, _ in found)
        raise Refused("several-content-terms", "more than one product could be queries times keys", nodes)
    if not found:
        raise why
    product = matrix_product(trace, found[0][0])
    if product.result.axes[-1] < product.result.axes[-2]:  # an einsum that names keys first
        product = product.columns_first()
    if product.result.axes != tuple(range(len(product.result.axes))):
        raise Refused("product-form", "the product of queries and keys is permuted", (label(product.node),))
    return product, found[0][1]


def _of_one_source(trace: Trace, anchor: Anchor, node: ir.Node) -> bool:
    """Whether the keys of a product are made of what the values are made of; others merely add to the scores."""
    try:
        value, _ = values_product(trace, anchor.reader)
        product = matrix_product(trace, node)
        sources = [raise_operand(trace, each).projection.source for each in (product.right, product.left, value)]
    except Refused:
        return False
    return bool(sources[2]) and sources[2] in sources[:2]


def _empty_rows(trace: Trace, anchor: Anchor) -> Literal["nan", "zero"]:
    hidden = np.full(trace.shape(anchor.softmax.scores), -np.inf)
    arrived = trace.probe(anchor.softmax.scores, anchor.reader.consumed, [hidden])
    return "nan" if arrived is None or np.isnan(arrived[0]).any() else "zero"


def raise_fused(trace: Trace, node: ir.Node) -> AttentionSite:
    """The site around one attention operator; raises `Refused` for forms that are not understood."""
    fused = read_fused(trace, node)
    form, raised = fused.form, fused.raised
    batch, heads = raised[0].batch, len(raised[0].projection.head_of)
    query, key, value = form.operands or (None, None, None)
    core = Core(
        query,
        key,
        value,
        form.context,
        fused.scale,
        fused.softcap,
        form.bias,
        np.broadcast_to(fused.offset, (batch, heads, *fused.offset.shape[-2:])),
        form.empty_rows,
        "",
        (node,),
        (form.context.name,),
        (form.dims[0], fused.keys),
        tuple(form.problems),
        fused.before,
        sink_H=form.sink_H,
    )
    return replace(assemble(trace, core, raised), after=fused.after)


def raise_anchor(trace: Trace, node: ir.Node) -> AttentionSite | None:
    """The site whose anchor is this node; None for nodes that are none; raises `Refused` if it is not understood."""
    return raise_fused(trace, node) if is_fused(node) else raise_softmax(trace, node)
