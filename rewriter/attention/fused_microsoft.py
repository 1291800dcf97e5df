"""com.microsoft Attention and MultiHeadAttention: packed weights, packed operands, every form of mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.attention.asides import Aside
from rewriter.attention.fused_forms import FusedForm, cache_of, named, number, operand_at, output_of, problem, sizes_of
from rewriter.attention.fused_masks import microsoft_bias
from rewriter.attention.operands import Operand
from rewriter.attention.trace import Trace, label
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, ScoreBias

FILL = -10000.0


def read_multi_head(trace: Trace, node: ir.Node) -> FusedForm:
    """Operands separate, keys packed with values, or all three packed; each with a bias of its own if there is one."""
    names, aside = named(node, 10), Aside(trace)
    heads = int(number(node, "num_heads", 0))
    operands = _operands(trace, node, names, heads)
    problems: list[Refusal] = []
    if any(names[8:]):
        problems.append(problem("cache-in-operator", "the operator shares a cache buffer", node))
    if output_of(node, 3):
        problems.append(problem("exposed-probabilities", "the operator gives its scores away", node))
    queries = aside.length(names[0], 1)
    keys = queries if not names[1] else aside.length(names[1], 2 if len(trace.shape(names[1])) == 4 else 1)
    total = aside.op("Add", keys, aside.length(names[6], 2)) if names[6] else keys
    return FusedForm(
        operands,
        operand_at(trace, str(node.outputs[0].name), heads),
        sizes_of(trace, operands),
        aside,
        _bias(trace, aside, node, names[4], names[5], (queries, total)),
        (cache_of(node, names[6], 1), cache_of(node, names[7], 2)),
        added=_packed_bias(trace, node, names[3], operands),
        problems=problems,
    )


def _operands(trace: Trace, node: ir.Node, names: list[str], heads: int) -> tuple[Operand, Operand, Operand]:
    if not names[1]:
        shape = trace.shape(names[0])
        if len(shape) != 5:
            raise Refused("operand-form", "queries alone that are not packed", (label(node),))
        parts = [Operand(names[0], (0, 2, 1, 3), (shape[0], heads), part=(3, i)) for i in range(3)]
    elif len(trace.shape(names[1])) == 5:
        lead = (trace.shape(names[1])[0], heads)
        parts = [operand_at(trace, names[0], heads)]
        parts += [Operand(names[1], (0, 2, 1, 3), lead, part=(3, i)) for i in range(2)]
    else:
        parts = [operand_at(trace, name, heads) for name in names[:3]]
    return parts[0], parts[1], parts[2]


def _bias(trace: Trace, aside: Aside, node: ir.Node, mask: str, added: str, sizes: tuple[str, str]) -> ScoreBias:
    causal, fill = bool(number(node, "unidirectional", 0)), number(node, "mask_filter_value", FILL)
    batch = trace.shape(str(node.outputs[0].name))[0]
    return microsoft_bias(trace, aside, mask, added, fill, causal, batch, sizes)


def _packed_bias(
    trace: Trace, node: ir.Node, name: str, operands: tuple[Operand, Operand, Operand]
) -> tuple[Array | None, ...]:
    """(heads, dim) added to queries, keys and values; keys and values that come with heads are left as they are."""
    if not name:
        return ()
    if name not in trace.fixed:
        raise Refused("operand-form", "what is added to the operands is computed", (label(node),))
    shapes = [operand.arrange(trace.value(operand.name)).shape[-1] for operand in operands]
    heads = operands[0].lead[1]
    cuts = np.cumsum([heads * dim for dim in shapes])[:-1]
    parts = [part.reshape(heads, -1) for part in np.split(trace.value(name).reshape(-1), cuts)]
    return (parts[0], None, None) if operands[1].straight else tuple(parts)


def read_packed(trace: Trace, node: ir.Node) -> FusedForm:
    """Attention whose one weight makes queries, keys and values; its cache (2, B, heads, T, D) holds both."""
    names, aside = named(node, 7), Aside(trace)
    heads, problems = int(number(node, "num_heads", 0)), list[Refusal]()
    if names[6] or number(node, "past_present_share_buffer", 0):
        problems.append(problem("cache-in-operator", "the operator shares a cache buffer", node))
    if number(node, "do_rotary", 0):
        problems.append(problem("rotary-in-operator", "the operator turns queries and keys itself", node))
    tokens, context = trace.shape(names[0])[1], str(node.outputs[0].name)
    past, present = names[4], output_of(node, 1)
    queries = total = aside.length(names[0], 1)
    caches = (("", ""), ("", ""))
    if past:
        total = aside.op("Add", queries, aside.length(past, 3))
        halves = [aside.op("Gather", past, aside.whole(i), axis=0) for i in (0, 1)]
        caches = ((halves[0], f"{context}/keys"), (halves[1], f"{context}/values"))
    elif present:
        caches = (("", f"{context}/keys"), ("", f"{context}/values"))
    return FusedForm(
        None,
        operand_at(trace, context, heads),
        (tokens, tokens),
        aside,
        _bias(trace, aside, node, names[3], names[5], (queries, total)),
        caches,
        present,
        problems=problems,
    )
