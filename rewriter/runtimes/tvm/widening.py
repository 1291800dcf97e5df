"""Half precision is computed in single: processors without arithmetic in it would convert around every operation.

Inputs and outputs keep their dtype. Where a graph itself rounds a wider number to half precision, it stays rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from rewriter.runtimes.tvm.program import Node, Program, Value

_HALVES = frozenset(("float16", "bfloat16"))
_SINGLE = np.dtype(np.float32)


def widen(program: Program) -> None:
    """Turn every float16 and bfloat16 value of a program into float32, in place."""
    halves = {name: value for name, value in program.values.items() if is_half(value.dtype)}
    if not halves:
        return
    for name, value in halves.items():
        constant = None if value.constant is None else value.constant.astype(np.float32)
        program.values[name] = replace(value, dtype=_SINGLE, constant=constant)
    nodes: list[Node] = []
    for node in program.nodes:
        nodes += _rounding(program, node) if node.op == "Cast" and _narrows(node, halves) else [node]
    program.nodes = nodes
    for name in program.inputs:
        if name in halves:
            _from_outside(program, halves[name])
    for name in dict.fromkeys(program.outputs):
        if name in halves:
            _to_outside(program, halves[name])


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of the two with 16 bits."""
    return str(dtype) in _HALVES


def _narrows(node: Node, halves: dict[str, Value]) -> bool:
    return node.outputs[0] in halves and node.inputs[0] not in halves


def _rounding(program: Program, node: Node) -> list[Node]:
    """A cast to half precision, and one back."""
    kind = np.float16 if int(node.attributes.get("to", 10)) == 10 else ml_dtypes.bfloat16
    name = _new(program, node.outputs[0], "half", np.dtype(kind))
    return [replace(node, outputs=(name,)), _cast(name, node.outputs[0])]


def _from_outside(program: Program, value: Value) -> None:
    """What reads an input reads a wide copy of it."""
    wide = _new(program, value.name, "single", _SINGLE)
    program.values[value.name] = value
    nodes = [replace(node, inputs=_renamed(node.inputs, value.name, wide)) for node in program.nodes]
    program.nodes = [_cast(value.name, wide), *nodes]


def _to_outside(program: Program, value: Value) -> None:
    """An output is a narrow copy of what is computed. One that is also an input or constant is cast as it is."""
    if value.name in program.inputs:
        return
    if value.constant is not None:
        program.values[value.name] = value
        return
    wide = _new(program, value.name, "single", _SINGLE)
    program.values[value.name] = value
    program.nodes = [
        replace(
            node,
            inputs=_renamed(node.inputs, value.name, wide),
            outputs=_renamed(node.outputs, value.name, wide),
        )
        for node in program.nodes
    ]
    program.nodes.append(_cast(wide, value.name))


def _new(program: Program, name: str, what: str, dtype: np.dtype[Any]) -> str:
    fresh = f"{name}/{what}"
    program.values[fresh] = Value(fresh, program.shape(name), dtype)
    return fresh


def _cast(source: str, target: str) -> Node:
    return Node("Cast", "", (source,), (target,), {}, target, 13)


def _renamed(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)
