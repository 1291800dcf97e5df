"""com.microsoft GroupQueryAttention: a cache written at places that data decide, rotation, windows, caps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.attention.asides import Aside
from rewriter.attention.fused_forms import (
    FusedForm,
    Turn,
    cache_of,
    named,
    number,
    operand_at,
    output_of,
    problem,
    sizes_of,
)
from rewriter.attention.fused_masks import both, column, count, limited, reachable, within
from rewriter.attention.operands import Operand
from rewriter.attention.trace import Trace, label
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, ScoreBias


def read_grouped(trace: Trace, node: ir.Node) -> FusedForm:
    """Causal attention of grouped queries; every row has its own number of valid keys."""
    names, aside = named(node, 14), Aside(trace)
    heads, groups = int(number(node, "num_heads", 0)), int(number(node, "kv_num_heads", 0))
    operands = _operands(trace, names, heads, groups)
    at, keys, places = _places(aside, names)
    keys_at, values_at = (_cache(node, names[3 + i], i + 1) for i in (0, 1))
    return FusedForm(
        operands,
        operand_at(trace, str(node.outputs[0].name), heads),
        sizes_of(trace, operands),
        aside,
        _bias(trace, aside, node, names, at, keys),
        (keys_at, values_at),
        places=places,
        turn=_turn(trace, aside, node, names, at),
        sink_H=_sink(trace, node, names[11], heads),
        problems=_problems(node, names),
    )


def _cache(node: ir.Node, past: str, index: int) -> tuple[str, str]:
    """(past, present): the places of new tokens are found by way of the cache even where nobody reads it."""
    past, present = cache_of(node, past, index)
    return past, present or f"{node.outputs[0].name}/present_{index}"


def _sink(trace: Trace, node: ir.Node, name: str, heads: int) -> Array | None:
    """A logit per head beside the keys; zeros for a smooth softmax."""
    if name and name not in trace.fixed:
        raise Refused("sink-computed", "what the softmax holds beside its keys is computed", (label(node),))
    if name:
        return trace.value(name).reshape(heads)
    return np.zeros(heads) if number(node, "smooth_softmax", 0) > 0 else None


def _problems(node: ir.Node, names: list[str]) -> list[Refusal]:
    found = []
    if any(names[12:]):
        found.append(problem("quantised-cache", "the cache holds integers", node))
    if output_of(node, 3):
        found.append(problem("exposed-probabilities", "the operator gives its scores away", node))
    return found


def _operands(trace: Trace, names: list[str], heads: int, groups: int) -> tuple[Operand, Operand, Operand]:
    if names[1]:
        sides = zip(names[:3], (heads, groups, groups), strict=True)
        parts = [operand_at(trace, name, count_) for name, count_ in sides]
    else:
        cuts = ((0, heads), (heads, heads + groups), (heads + groups, heads + 2 * groups))
        lead, whole = trace.shape(names[0])[0], heads + 2 * groups
        parts = [Operand(names[0], (0, 2, 1, 3), (lead, b - a), whole, heads=(a, b)) for a, b in cuts]
    return parts[0], parts[1], parts[2]


def _places(aside: Aside, names: list[str]) -> tuple[str, str, str]:
    """(places (B, S) of the new tokens, number of keys, which token each place of the cache holds (B, T)).

    A first call, whose tokens are all there are, may be padded on the right: its rows begin at 0 whatever they hold.
    """
    last = column(aside, names[5])
    total = aside.op("Reshape", aside.op("Cast", names[6], to=7), aside.ints())
    tokens, past = aside.length(names[0], 1), aside.length(names[3], 2) if names[3] else aside.whole(0)
    keys = aside.op("Max", total, past)
    one = aside.whole(1)
    begin = aside.op("Max", aside.op("Sub", aside.op("Add", last, one), tokens), aside.whole(0))
    begin = aside.op("Where", aside.op("Less", tokens, total), begin, aside.whole(0))
    steps = count(aside, keys)
    own = aside.op("Sub", steps, begin)
    fresh = both(aside, aside.op("Less", own, tokens), aside.op("Not", aside.op("Less", own, aside.whole(0))))
    old = aside.op("Where", aside.op("Less", own, aside.whole(0)), steps, aside.whole(-1))
    places = aside.op("Where", fresh, aside.op("Add", own, past), old)
    return aside.op("Add", begin, count(aside, tokens)), keys, places


def _bias(trace: Trace, aside: Aside, node: ir.Node, names: list[str], at: str, keys: str) -> ScoreBias:
    window = int(number(node, "local_window_size", -1))
    places = aside.unsqueeze(at, 1, 3)
    allowed = reachable(aside, places, keys, True, window - 1 if window > 0 else -1, -1)
    ends = aside.op("Add", column(aside, names[5]), aside.whole(1))
    allowed = both(aside, allowed, aside.unsqueeze(within(aside, ends, "", keys), 1, 2))
    return limited(trace, aside, _as_long(trace, aside, names[10], keys), allowed)


def _as_long(trace: Trace, aside: Aside, added: str, keys: str) -> str:
    """What is added to the scores, with zeros for keys behind its end."""
    if not added:
        return ""
    lead = aside.op("Slice", aside.op("Shape", added), aside.ints(0), aside.ints(3))
    missing = aside.op("Max", aside.op("Sub", keys, aside.length(added, 3)), aside.whole(0))
    shape = aside.op("Concat", lead, aside.op("Reshape", missing, aside.ints(1)), axis=0)
    return aside.op("Concat", added, aside.op("Expand", aside.number(0.0), shape), axis=3)


def _turn(trace: Trace, aside: Aside, node: ir.Node, names: list[str], at: str) -> Turn | None:
    if not number(node, "do_rotary", 0) or not names[7]:
        return None
    rows = names[9] or at
    cos, sin = (aside.op("Gather", name, rows, axis=0) for name in names[7:9])
    return Turn(cos, sin, 2 * trace.shape(names[7])[-1], bool(number(node, "rotary_interleaved", 0)))
