"""What every anchor gives, and the site that is made of it: output, lengths, classification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from rewriter.attention.asides import read_by
from rewriter.attention.linears import comes_from_inputs
from rewriter.attention.masks import classify
from rewriter.attention.opaque import opaque_operand
from rewriter.attention.operands import Operand, matrix_product
from rewriter.attention.output import RaisedOutput, raise_output
from rewriter.attention.projections import Raised, raise_operand
from rewriter.attention.readers import Reader, read_elsewhere
from rewriter.attention.scores import tidy
from rewriter.attention.trace import Trace, inputs_of, label, outputs_of
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, AttentionSite, Projection, ScoreBias, State, Step


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
    before: tuple[Step, ...] = ()  # makes values that the bias refers to
    sink_H: Array | None = None
    content: tuple[str, str] = ("", "")  # the product of queries and keys, and the scores it becomes


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
    linears = [r.linear.node for r in raised if r.linear] + ([output.linear.node] if output and output.linear else [])
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
        sink_H=core.sink_H,
        bias=core.bias,
        empty_rows=core.empty_rows,
        cross=_cross(trace, query.projection, key.projection),
        escapes=escapes,
        nodes=tuple(dict.fromkeys(label(node) for node in (*core.nodes, *linears))),
        problems=tuple(problems),
        example_shape=(batch, tokens, keys),
        order=trace.position(last),
        names=_names(core, last),
        before=(*core.before, *_steps(raised)),
    )
    return _classified(_bias_dependence(trace, site, raised), core, batch, heads)


def _names(core: Core, last: str) -> dict[str, str]:
    """Values inside the region, by what they are; `last` is its result."""
    return {
        "context": core.context.name,
        "probabilities": core.probabilities,
        "product": core.content[0],
        "scores": core.content[1],
        "inner": "\n".join(name for name in core.inner if name != last),
    }


def _steps(raised: tuple[Raised, Raised, Raised]) -> tuple[Step, ...]:
    """What makes opaque operands, each value once."""
    return tuple({step.output: step for r in raised for step in r.steps}.values())


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
    targets = [name for target in targets for name in read_by(site.before, target) if trace.floating(name)]
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


def _raised(trace: Trace, operand: Operand) -> Raised:
    """A projection, or a value of the graph, laid out anew if it must be."""
    try:
        return raise_operand(trace, operand)
    except Refused as problem:
        return opaque_operand(trace, operand, problem.refusal.why)


def _aligned(
    trace: Trace, operands: tuple[Operand, Operand, Operand], raised: tuple[Raised, Raised, Raised]
) -> tuple[Raised, Raised, Raised]:
    """Operands that disagree on what is batch: opaque ones follow the projections, or all are values of the graph."""
    known = {r.batch for r in raised if r.linear is not None}
    windows = len(operands[0].lead) > 2

    def again(operand: Operand, one: Raised) -> Raised:
        if one.linear is not None and not windows:
            return one
        return opaque_operand(trace, operand, one.projection.opaque_why or "tokens in windows", min(known, default=0))

    if len(known) > 1 and not windows:
        return raised
    first, second, third = (again(o, r) for o, r in zip(operands, raised, strict=True))
    return first, second, third


def values_product(trace: Trace, reader: Reader) -> tuple[Operand, Operand]:
    """(values, result) as (lead..., tokens, dim), whichever side of the product the probabilities are on."""
    product = matrix_product(trace, reader.node)
    if product.factor != 1.0:
        raise Refused("product-form", "the product with the values is scaled", (label(product.node),))
    if reader.position == 0:
        return product.right.swapped(), product.result
    return product.left.swapped(), product.result.swapped()


def raise_operands(trace: Trace, query: Operand, key: Operand, value: Operand) -> tuple[Raised, Raised, Raised]:
    """The three operands; raises `Refused` if they do not fit together."""
    operands = (query, key, value)
    first, second, third = (_raised(trace, operand) for operand in operands)
    raised = (first, second, third)
    if len({r.batch for r in raised}) != 1:
        raised = _aligned(trace, operands, raised)
    if len({r.batch for r in raised}) != 1:
        raise Refused("batch-sizes", f"operands with batch sizes {[r.batch for r in raised]}")
    if len({len(r.projection.head_of) for r in raised}) != 1:
        raise Refused("head-counts", "operands with different numbers of heads")
    return raised
