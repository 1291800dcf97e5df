"""What is read off an attention operator of the graph, whichever it is, and how its inputs are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from rewriter.attention.asides import Aside
from rewriter.attention.operands import Operand
from rewriter.attention.trace import Trace, inputs_of, label
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import Array, ScoreBias


@dataclass(frozen=True)
class Turn:
    """A rotation inside the operator: tables (B, S, half) that steps make."""

    cos: str
    sin: str
    size: int
    interleaved: bool


@dataclass(frozen=True)
class FusedForm:
    """An attention operator: three operands, or the input and packed weight they are made from.

    `caches` are (past, present) names of keys and values; `added` is what the operator adds to queries, keys, values;
    `places` says where the cache holds which token; `dims` are numbers of queries and of new keys.
    """

    operands: tuple[Operand, Operand, Operand] | None
    context: Operand
    dims: tuple[int, int]
    aside: Aside
    bias: ScoreBias = field(default_factory=ScoreBias)
    caches: tuple[tuple[str, str], tuple[str, str]] = (("", ""), ("", ""))
    packed_present: str = ""
    places: str = ""
    added: tuple[Array | None, ...] = ()
    turn: Turn | None = None
    sink_H: Array | None = None
    empty_rows: Literal["nan", "zero"] = "nan"
    problems: Sequence[Refusal] = ()


def number(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute."""
    return float(node.attributes[name].value) if name in node.attributes else default


def named(node: ir.Node, count: int) -> list[str]:
    """Names of this many inputs, "" where one is left out."""
    names = inputs_of(node)
    return names + [""] * (count - len(names))


def output_of(node: ir.Node, index: int) -> str:
    """The name of an output that something reads; "" otherwise."""
    value = node.outputs[index] if index < len(node.outputs) else None
    used = value is not None and value.name and (value.uses() or value.is_graph_output())
    return str(value.name) if used and value is not None else ""


def cache_of(node: ir.Node, past: str, index: int) -> tuple[str, str]:
    """(past, present); a cache that is read and not given away gets a name of its own."""
    present = output_of(node, index)
    if past and not present:
        present = f"{node.outputs[0].name}/present_{index}"
    return past, present


def operand_at(trace: Trace, name: str, heads: int) -> Operand:
    """(B, S, heads * D) or (B, heads, S, D) as an operand."""
    shape = trace.shape(name)
    if len(shape) == 4:
        return Operand(name, (0, 1, 2, 3), shape[:2])
    if len(shape) != 3 or not heads or shape[2] % heads:
        raise Refused("operand-form", f"an operand of {len(shape)} axes for {heads} heads")
    return Operand(name, (0, 2, 1, 3), (shape[0], heads), heads)


def sizes_of(trace: Trace, operands: Sequence[Operand]) -> tuple[int, int]:
    """Numbers of queries and of new keys."""
    query, key = (operand.arrange(trace.value(operand.name)) for operand in operands[:2])
    return int(query.shape[-2]), int(key.shape[-2])


def problem(code: str, why: str, node: ir.Node) -> Refusal:
    """A reason at a node."""
    return Refusal(code, why, (label(node),))
