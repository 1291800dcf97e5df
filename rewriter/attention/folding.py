"""Heads folded into the batch the other way round: all items of the first head, then all of the second."""

from __future__ import annotations

from dataclasses import replace

from rewriter.attention.linears import linears_before, read_linear
from rewriter.attention.operands import Operand
from rewriter.attention.trace import Trace
from rewriter.attention.views import head_layout, view_between
from rewriter.core.refusal import Refused
from rewriter.core.site import Array


def in_item_order(trace: Trace, operands: tuple[Operand, ...], context: Operand) -> tuple[tuple[Operand, ...], Operand]:
    """Operands and result with items before heads, where they share one axis that counts heads first."""
    for operand in operands:
        batch = _heads_first(trace, operand) if len(operand.lead) == 1 else 0
        if batch:
            turned = tuple(replace(each, heads_first=batch) for each in operands)
            return turned, replace(context, heads_first=batch)
    return operands, context


def _heads_first(trace: Trace, operand: Operand) -> int:
    """The number of items if heads come first, by where the operand's elements come from; 0 otherwise."""
    for node in linears_before(trace, operand.name)[:1]:
        try:
            linear = read_linear(trace, node)
        except Refused:
            continue
        view = view_between(trace, linear.result, operand.name)
        batch = linear.rows[0]
        if view is None or batch < 2 or operand.lead[0] % batch or operand.lead[0] == batch:
            continue
        element, width = linear.channels_last(view.element), linear.weight_CN.shape[1]
        if not _layout(operand, element, width, linear.rows) and _layout(
            replace(operand, heads_first=batch), element, width, linear.rows
        ):
            return batch
    return 0


def _layout(operand: Operand, element: Array, width: int, rows: tuple[int, int]) -> bool:
    try:
        head_layout(operand.arrange(element), width, rows)
    except Refused:
        return False
    return True
