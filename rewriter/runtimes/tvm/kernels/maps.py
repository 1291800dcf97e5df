"""Functions of one tensor, element by element, on vectors: what the default schedules do with scalar library calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, expressions
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, loop, scratch, store, vec

FUNCTIONS: dict[str, Callable[[Expression, int], Expression]] = {
    **{name: function for name, function in expressions.ACTIVATIONS.items() if name},
    "coarse_gelu": expressions.coarse_gelu,
    "erf": expressions.erf,
    "exp": expressions.exp,
    "sigmoid": expressions.sigmoid,
}


@dataclass(frozen=True)
class Map:
    """`function` of every element of a tensor of `shape`."""

    shape: tuple[int, ...]
    function: str
    lanes: int = 16


def make_map(spec: Map, name: str = "map") -> Any:
    """PrimFunc (x, y)."""
    count, lanes, function = prod(spec.shape), spec.lanes, FUNCTIONS[spec.function]
    full, left = emit.split(count, lanes)

    def body(x: Buffer, y: Buffer) -> None:
        source, target = emit.flat(x, (count,)), emit.flat(y, (count,))
        if full:
            with loop(full) as part:
                store(target, function(source[vec(part * lanes, lanes)], lanes), vec(part * lanes, lanes))
        if left:
            tail = scratch((lanes,), registers=True)
            for lane in range(lanes):
                store(tail, source[full * lanes + lane] if lane < left else T.float32(0), lane)
            store(tail, function(tail[vec(0, lanes)], lanes), vec(0, lanes))
            for lane in range(left):
                store(target, tail[lane], full * lanes + lane)

    return emit.prim_func(name, [("x", spec.shape, "float32"), ("y", spec.shape, "float32")], 1, body)
