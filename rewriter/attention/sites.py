"""One anchor becomes one raised site: operands, scores, output, classification. Nothing of the graph is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from rewriter.attention.anchors import Anchor, read_elsewhere, softmax_anchor, softmax_values
from rewriter.attention.fused import (
    FusedForm,
    fused_bias,
    grouped,
    is_fused,
    number,
    packed_projections,
    read_fused,
    with_added,
    with_cache,
)
from rewriter.attention.linears import comes_from_inputs
from rewriter.attention.masks import classify
from rewriter.attention.operands import Operand, Product, matrix_product
from rewriter.attention.output import RaisedOutput, raise_output
from rewriter.attention.projections import Raised, raise_operand, scaled_per_head
from rewriter.attention.scores import ScoreFunction, read_bias, read_scores, tidy
from rewriter.attention.trace import Trace, close, inputs_of, label, outputs_of
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, AttentionSite, Projection, ScoreBias, State


@dataclass(frozen=True)
class Core:
    """What every anchor gives, however it is spelled: three operands, a score function, a result."""

    query: Operand | None
    key: Operand | None
    value: Operand | None
    context: Operand
    scale: float
    softcap: float
    bias: ScoreBias
    offset: Array | None  # additive part for classification, (slots..., S, T)
    empty_rows: Literal["nan", "zero"]
    probabilities: str
    nodes: tuple[ir.Node, ...]
    inner: tuple[str, ...]  # values that must not survive the lowering
    dims: tuple[int, int] = (0, 0)  # queries and keys, where operands do not tell
    problems: tuple[Refusal, ...] = ()


def raise_softmax(trace: Trace, node: ir.Node) -> AttentionSite | None:
    """The site around one softmax; None if it is no attention; raises `Refused` if it is not understood."""
    values_of = softmax_values(trace, node)
    anchor = softmax_anchor(trace, node, *values_of) if values_of else None
    if anchor is None:
        return None
    product, function = _content(trace, anchor)
    value, context = _values_product(trace, anchor)
    query, key = (product.right, product.left) if anchor.turned else (product.left, product.right)
    raised = _operands(trace, query, key, value)
    heads = len(raised[0].projection.head_of)
    if function.slopes is not None:
        raised = (scaled_per_head(raised[0], _per_head(function.slopes, heads)), *raised[1:])
    bias = read_bias(trace, product.result.name, anchor.scores, heads, function.offset)
    core = Core(
        query,
        key,
        value,
        context,
        function.slope,
        function.softcap,
        bias,
        function.offset.swapaxes(-1, -2) if anchor.turned else function.offset,
        _empty_rows(trace, anchor),
        anchor.probabilities,
        (product.node, node, anchor.reader.node),
        (product.result.name, anchor.probabilities, context.name),
    )
    site = assemble(trace, core, raised)
    if not anchor.turned or bias.kind == "none":
        return site
    why = Refusal("softmax-axis", "what is added to the scores has keys before queries", (label(node),))
    return replace(site, problems=(*site.problems, why))


def _per_head(slopes: Array, heads: int) -> tuple[float, ...]:
    """One factor for each head, the same for every batch item."""
    rows = slopes.reshape(-1, heads)
    if not close(rows, np.broadcast_to(rows[:1], rows.shape), 1e-8):
        raise Refused("scale-per-item", "batch items are scaled differently")
    return tuple(tidy(float(factor)) for factor in rows[0])


def _content(trace: Trace, anchor: Anchor) -> tuple[Product, ScoreFunction]:
    """The one product the scores are an element-wise function of; position terms fail that test."""
    found, why = [], Refused("no-content-term", "no product of queries and keys reaches the scores")
    for node in anchor.candidates:
        try:
            found.append((node, read_scores(trace, outputs_of(node)[0], anchor.scores)))
        except Refused as problem:
            why = problem
    if len(found) > 1:
        nodes = tuple(label(node) for node, _ in found)
        raise Refused("several-content-terms", "more than one product could be queries times keys", nodes)
    if not found:
        raise why
    product = matrix_product(trace, found[0][0])
    if product.result.axes != tuple(range(len(product.result.axes))):
        raise Refused("product-form", "the product of queries and keys is permuted", (label(product.node),))
    return product, found[0][1]


def _values_product(trace: Trace, anchor: Anchor) -> tuple[Operand, Operand]:
    """(values, result) as (lead..., tokens, dim), whichever side of the product the probabilities are on."""
    reader = anchor.reader
    product = matrix_product(trace, reader.node)
    sides = (product.left, product.right) if reader.position == 0 else (product.right, product.left)
    before, behind = trace.value(anchor.probabilities), sides[0].arrange(trace.value(reader.consumed))
    if anchor.turned:
        before = before.swapaxes(-1, -2)
    same = before.size == behind.size and before.shape[-2:] == behind.shape[-2:]
    if not same or not np.array_equal(np.nan_to_num(before).reshape(behind.shape), behind):
        raise Refused("probabilities-changed", "probabilities are changed before they meet the values")
    return sides[1].swapped(), product.result if reader.position == 0 else product.result.swapped()


def _empty_rows(trace: Trace, anchor: Anchor) -> Literal["nan", "zero"]:
    hidden = np.full(trace.shape(anchor.scores), -np.inf)
    arrived = trace.probe(anchor.scores, anchor.reader.consumed, [hidden])
    return "nan" if arrived is None or np.isnan(arrived[0]).any() else "zero"


def _operands(trace: Trace, query: Operand, key: Operand, value: Operand) -> tuple[Raised, Raised, Raised]:
    raised = (raise_operand(trace, query), raise_operand(trace, key), raise_operand(trace, value))
    if len({r.batch for r in raised}) != 1:
        raise Refused("batch-sizes", f"operands with batch sizes {[r.batch for r in raised]}")
    if len({len(r.projection.head_of) for r in raised}) != 1:
        raise Refused("head-counts", "operands with different numbers of heads")
    return raised


def assemble(trace: Trace, core: Core, raised: tuple[Raised, Raised, Raised]) -> AttentionSite:
    """The site of a core whose operands are raised. A missing output projection leaves it merely found."""
    query, key, value = raised
    heads, batch = len(query.projection.head_of), query.batch
    problems: list[Refusal] = list(core.problems)
    output: RaisedOutput | None = None
    try:
        output = raise_output(trace, core.context, heads, batch, value.factor, query.projection.source)
    except Refused as problem:
        problems.append(problem.refusal)
    tokens, keys = _lengths(trace, core, batch)
    linears = [r.linear.node for r in raised if r.linear] + ([output.linear.node] if output else [])
    last = output.projection.value if output else core.context.name
    escapes = read_elsewhere(trace, core.probabilities, last) if core.probabilities else ()
    if escapes:
        problems.append(Refusal("exposed-probabilities", f"{', '.join(escapes)} reads the probabilities", escapes))
    site = AttentionSite(
        id="",
        query=query.projection,
        key=key.projection,
        value=value.projection,
        output=output.projection if output else None,
        heads=heads,
        scale=tidy(core.scale * query.factor * key.factor),
        softcap=core.softcap,
        bias=core.bias,
        empty_rows=core.empty_rows,
        cross=_cross(trace, query.projection, key.projection),
        escapes=escapes,
        nodes=tuple(dict.fromkeys(label(node) for node in (*core.nodes, *linears))),
        problems=tuple(problems),
        example_shape=(batch, tokens, keys),
        order=trace.position(last),
        names={"context": core.context.name, "probabilities": core.probabilities, "inner": "\n".join(core.inner)},
    )
    return _classified(_bias_dependence(trace, site, raised), core, batch, heads)


def _lengths(trace: Trace, core: Core, batch: int) -> tuple[int, int]:
    if core.query is None or core.key is None or any(core.dims):
        return core.dims

    def tokens(operand: Operand) -> int:
        return int(operand.arrange(trace.value(operand.name)).shape[-2])

    return tokens(core.query), tokens(core.key)


def _cross(trace: Trace, query: Projection, key: Projection) -> bool:
    if key.opaque:
        return comes_from_inputs(trace, key.opaque)
    return bool(query.source) and key.source != query.source


def _bias_dependence(trace: Trace, site: AttentionSite, raised: tuple[Raised, Raised, Raised]) -> AttentionSite:
    """A bias made from queries or keys is kept as a value, and named: some rewrites must refuse it."""
    targets = _bias_sources(trace, site.bias)
    problems = list(site.problems)
    for role, operand in zip(("query", "key"), raised, strict=False):
        if operand.linear and any(_moves(trace, operand.linear.result, target) for target in targets):
            why = f"an additive term of the scores is computed from the {role} projection"
            problems.append(Refusal(f"bias-depends-on-{role}", why, tuple(targets)))
    return replace(site, problems=tuple(problems))


def _bias_sources(trace: Trace, bias: ScoreBias) -> list[str]:
    """The values an additive term is made of: itself, or what its path reads besides the product."""
    if bias.kind != "path":
        return [bias.value] if bias.value else []
    path = trace.between(bias.value, bias.path_end) or []
    inside = {bias.value}.union(*(outputs_of(node) for node in path))
    read = dict.fromkeys(name for node in path for name in inputs_of(node))
    return [name for name in read if name not in inside and name not in trace.shaped and trace.floating(name)]


def _moves(trace: Trace, source: str, target: str) -> bool:
    random = np.random.default_rng(7).standard_normal(trace.shape(source))
    moved = trace.probe(source, target, [random])
    return moved is not None and not np.array_equal(moved[0], trace.value(target), equal_nan=True)


def _classified(site: AttentionSite, core: Core, batch: int, heads: int) -> AttentionSite:
    if core.offset is None:
        return replace(site, state=State.MAPPED if site.mapped else State.FOUND)
    offset = core.offset
    if offset.ndim == 4:
        offset = np.broadcast_to(offset, (batch, heads, *offset.shape[-2:]))
    else:
        offset = offset.reshape(batch, heads, *offset.shape[-2:])
    mask, causal, soft = classify(offset)
    turned = site.query.rotary is not None or site.key.rotary is not None
    position: Literal["none", "rotary", "bias", "opaque"] = "rotary" if turned else "bias" if soft else "none"
    if position == "none" and "" not in (site.query.opaque, site.key.opaque):
        position = "opaque"
    state = State.MAPPED if site.mapped else State.FOUND
    return replace(site, mask=mask, causal=causal, position=position, state=state)


def raise_fused(trace: Trace, node: ir.Node) -> AttentionSite:
    """The site around one attention operator; raises `Refused` for forms that are not understood."""
    form = read_fused(trace, node)
    raised = packed_projections(trace, node) if form.operands is None else _fused_operands(trace, form, form.operands)
    heads, batch = len(raised[0].projection.head_of), raised[0].batch
    past = form.caches[0][0]
    keys = form.dims[1] + (trace.shape(past)[-2] if past else 0)
    bias, offset = fused_bias(trace, form, keys)
    nothing = np.zeros((batch, heads, form.dims[0], keys))
    query, key, value = form.operands or (None, None, None)
    dim = raised[0].projection.dim
    core = Core(
        query,
        key,
        value,
        form.context,
        number(node, "scale", 0.0) or dim**-0.5,
        number(node, "softcap", 0.0),
        bias,
        nothing if offset is None else offset,
        "zero" if form.empty_rows == "zero" else "nan",
        "",
        (node,),
        (form.context.name,),
        (form.dims[0], keys),
        form.problems,
    )
    return assemble(trace, core, raised)


def _fused_operands(
    trace: Trace, form: FusedForm, operands: tuple[Operand, Operand, Operand]
) -> tuple[Raised, Raised, Raised]:
    first, *others = (raise_operand(trace, operand) for operand in operands)
    heads = len(first.projection.head_of)
    if form.added:
        first, *others = (with_added(r, part) for r, part in zip((first, *others), form.added, strict=True))
    key, value = (grouped(with_cache(r, cache), heads) for r, cache in zip(others, form.caches, strict=True))
    if len({r.batch for r in (first, key, value)}) != 1:
        raise Refused("batch-sizes", f"operands with batch sizes {[r.batch for r in (first, key, value)]}")
    return first, key, value


def raise_anchor(trace: Trace, node: ir.Node) -> AttentionSite | None:
    """The site whose anchor is this node; None for nodes that are none; raises `Refused` if it is not understood."""
    return raise_fused(trace, node) if is_fused(node) else raise_softmax(trace, node)
