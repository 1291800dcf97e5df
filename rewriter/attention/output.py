"""From the attention result to its output projection: which rows of W_O each head feeds.

Where a gate, a norm or a sum comes before any projection, or none follows at all, the result is the attended values
themselves, at the last value that still holds one row for each token. It is described as a projection by the identity,
so that rewrites of values and results keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.attention.linears import Linear, read_linear
from rewriter.attention.operands import Operand
from rewriter.attention.recipes import stored
from rewriter.attention.trace import SHAPES, VIEWS, Trace, inputs_of, label, outputs_of
from rewriter.attention.views import view_between
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, OutputProjection


@dataclass(frozen=True)
class RaisedOutput:
    """The output projection and its node, if any. The factor its path multiplies by is already in the weights."""

    projection: OutputProjection
    linear: Linear | None


def raise_output(trace: Trace, context: Operand, heads: int, batch: int, factor: float, source: str) -> RaisedOutput:
    """The output projection of an attention result laid out as `context` says.

    `factor` is what the value path multiplies by; `source` names the query input, whose leading axes a result with
    several token axes takes. Raises `Refused` if there is none and the attended values have no layout of a result.
    """
    try:
        return _projected(trace, context, heads, batch, factor, source)
    except Refused:
        bare = _bare(trace, context, heads, batch, factor, source)
        if bare is None:
            raise
        return RaisedOutput(bare, None)


def _projected(trace: Trace, context: Operand, heads: int, batch: int, factor: float, source: str) -> RaisedOutput:
    """Raises `Refused` if anything but a view lies between, or if the result is read elsewhere."""
    node = _single_linear(trace, context.name)
    linear = read_linear(trace, node, batched=False)
    data = inputs_of(node)[0]
    view = view_between(trace, context.name, data)
    if view is None:
        raise Refused("output-path", "the way to the output projection is no view", (label(node),))
    element = linear.rows_last(view.element)
    rows_HD, time_first = _rows(trace, context, linear.weight_CN.shape[0], element, heads, batch)
    weight = linear.rows_of(rows_HD, factor * view.factor)
    rank = len(trace.shape(linear.result))
    if rank != linear.rank or (rank > 3 and not _same_tokens(trace, source, linear.result, linear.channels_first)):
        raise Refused("output-layout", "the result has several token axes", (label(node),))
    bias = linear.bias_N
    if view.offset.any():
        raise Refused("output-path", "something is added before the output projection", (label(node),))
    projection = OutputProjection(
        value=linear.result,
        weight_HDC=weight,
        bias_C=None if bias is None or not bias.any() else stored(bias, linear.dtype),
        weight_name=linear.weight_name,
        bias_name=linear.bias_name,
        rank=rank,
        time_first=time_first,
        flatten_like=source if rank > 3 else "",
        channels_first=linear.channels_first,
    )
    return RaisedOutput(projection, linear)


def _bare(
    trace: Trace, context: Operand, heads: int, batch: int, factor: float, source: str
) -> OutputProjection | None:
    """The attended values as a projection by the identity, or by a permutation; None if no value has a fit layout."""
    dim = context.arrange(trace.value(context.name)).shape[-1]
    for value in reversed(_views_of(trace, context.name)):
        shape, view = trace.shape(value), view_between(trace, context.name, value)
        if view is None or view.offset.any():
            continue
        for channels_first in (False, True):
            fits = len(shape) >= 3 and shape[1 if channels_first else -1] == heads * dim
            if not fits or (len(shape) > 3 and not _same_tokens(trace, source, value, channels_first)):
                continue
            element = view.element.reshape(shape)
            if channels_first:
                element = element.reshape(shape[0], shape[1], -1).transpose(0, 2, 1)
            try:
                rows_HD, time_first = _rows(trace, context, heads * dim, element, heads, batch)
            except Refused:
                continue
            weight_HDC = (factor * view.factor * np.eye(heads * dim))[rows_HD]
            return OutputProjection(
                value=value,
                weight_HDC=stored(weight_HDC, np.dtype(np.float32)),
                rank=len(shape),
                time_first=time_first,
                flatten_like=source if len(shape) > 3 else "",
                channels_first=channels_first,
            )
    return _apart(context, heads, batch, factor * np.eye(heads * dim).reshape(heads, dim, -1))


def _apart(context: Operand, heads: int, batch: int, weight_HDC: Array) -> OutputProjection | None:
    """The attended values where heads have an axis of their own, or share the first with the batch."""
    if context.new or context.split or context.lead not in ((batch, heads), (batch * heads,)):
        return None
    rank = len(context.axes)
    if rank == 4:  # (B, S, H, D) as the product lays it out
        perm = tuple((0, 2, 1, 3)[axis] for axis in np.argsort(context.axes))
    elif context.axes == (0, 1, 2):
        perm = (2, 0, 1, 3) if context.heads_first else (0, 2, 1, 3)
    else:
        return None
    weight_HDC = stored(weight_HDC, np.dtype(np.float32))
    return OutputProjection(value=context.name, weight_HDC=weight_HDC, rank=rank, apart=heads, perm=perm)


def _views_of(trace: Trace, context: str) -> list[str]:
    """The attended values and what views make of them, as long as nothing else reads them."""
    found = [context]
    while found[-1] not in trace.outputs:
        readers = [node for node in trace.consumers[found[-1]] if node.op_type not in SHAPES]
        if len(readers) != 1 or readers[0].op_type not in VIEWS or inputs_of(readers[0])[0] != found[-1]:
            break
        made = outputs_of(readers[0])
        if len(made) != 1 or trace.size(made[0]) != trace.size(found[-1]):
            break
        found += made
    return found


def _same_tokens(trace: Trace, source: str, result: str, channels_first: bool) -> bool:
    if not source or len(trace.shape(source)) != len(trace.shape(result)):
        return False
    tokens = slice(2, None) if channels_first else slice(None, -1)
    return trace.shape(source)[tokens] == trace.shape(result)[tokens]


def _single_linear(trace: Trace, context: str) -> ir.Node:
    stack, seen, linears = [context], set(), []
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in trace.outputs:
            raise Refused("result-exposed", "the attention result is a graph output")
        for node in trace.consumers[name]:
            if trace.linear(node):
                linears.append(node)
            elif (node.op_type in VIEWS and (name == inputs_of(node)[0] or _rejoined(trace, node))) or (
                node.op_type in ("Mul", "Div") and any(i in trace.shaped for i in inputs_of(node))
            ):
                stack += outputs_of(node)
            elif node.op_type not in SHAPES:
                raise Refused("output-path", f"{node.op_type} between attention and output projection", (label(node),))
    if len(linears) != 1:
        raise Refused("output-projections", f"{len(linears)} output projections", tuple(map(label, linears)))
    return linears[0]


def _rejoined(trace: Trace, node: ir.Node) -> bool:
    """Whether a node puts the pieces of one value together again."""
    makers = {id(trace.producer.get(name)) for name in inputs_of(node)}
    return node.op_type == "Concat" and len(makers) == 1 and inputs_of(node)[0] in trace.producer


def _rows(trace: Trace, context: Operand, width: int, element: Array, heads: int, batch: int) -> tuple[Array, bool]:
    """(row of W_O for each head and dim, whether tokens come before batch items)."""
    arranged = context.arrange(np.arange(trace.value(context.name).size).reshape(trace.shape(context.name)))
    tokens, dim = arranged.shape[-2:]
    if arranged.size != batch * heads * tokens * dim:
        raise Refused("output-layout", "slots of the attention result")
    place = np.empty(arranged.size, np.int64)
    place[arranged.reshape(-1)] = np.arange(arranged.size)
    if width != heads * dim or element.size != arranged.size:
        raise Refused("output-layout", "the output projection reads more than this attention")
    b, h, t, d = np.unravel_index(place[element.reshape(-1)], (batch, heads, tokens, dim))
    row = np.arange(element.size) // width
    for time_first in (False, True):
        if np.array_equal(row, t * batch + b if time_first else b * tokens + t):
            rows_HD = np.full((heads, dim), -1)
            rows_HD[h[:width], d[:width]] = np.arange(width)
            same = rows_HD[h, d] == np.arange(element.size) % width
            if (rows_HD >= 0).all() and same.all():
                return rows_HD, time_first
    raise Refused("output-layout", "token order of the output projection")
