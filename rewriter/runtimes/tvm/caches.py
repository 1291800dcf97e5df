"""Caches of bfloat16 are read as they are: a copy of them in float32 would cost more than the attention."""

from __future__ import annotations

from dataclasses import replace

from rewriter.runtimes.tvm.kernels import decode
from rewriter.runtimes.tvm.kernels.attention import Operand, repeats_of
from rewriter.runtimes.tvm.program import Node, Program

KEY, VALUE = 1, 2


def read_narrow(program: Program, lanes: int) -> None:
    """Where a widened cache is read by few queries alone, the attention reads the cache itself. In place."""
    producers, changed = program.producers(), False
    for index, node in enumerate(program.nodes):
        if node.key != "rewriter:Attention" or not _few_rows(program, node):
            continue
        sources = [_bfloat16(program, producers.get(node.inputs[role])) for role in (KEY, VALUE)]
        heads = [int(node.attributes[f"{role}_heads"]) for role in ("key", "value")]
        if all(sources) and all(_whole(program, *pair, lanes) for pair in zip(sources, heads, strict=True)):
            inputs = (node.inputs[0], *sources, *node.inputs[3:])
            program.nodes[index], changed = replace(node, inputs=inputs), True
    if changed:
        program.prune()


def _few_rows(program: Program, node: Node) -> bool:
    if any(f"{role}_window" in node.attributes for role in ("key", "value")):
        return False
    heads = (node.attributes["key_head_of"], node.attributes["value_head_of"])
    return program.shape(node.inputs[0])[-2] * repeats_of(*heads) <= decode.MOST_ROWS


def _bfloat16(program: Program, made_by: Node | None) -> str:
    """What a cast widened from bfloat16; empty where that is not what happened."""
    if made_by is None or made_by.op != "Cast" or str(program.dtype(made_by.inputs[0])) != "bfloat16":
        return ""
    return made_by.inputs[0]


def _whole(program: Program, name: str, heads: int, lanes: int) -> bool:
    operand = Operand.of(program.shape(name), heads, "bfloat16")
    return operand.dim % decode.step(operand, lanes) == 0
