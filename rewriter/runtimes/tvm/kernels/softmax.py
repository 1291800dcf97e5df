"""Softmax over the last axis, outside attention: rows on vectors, exponentials by polynomial."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.emit import Buffer, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import exp

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Softmax:
    """exp(x - max) / sum over the last axis. A row that is all -inf gives NaN, as the definition does."""

    shape: tuple[int, ...]
    lanes: int = 16
    threads: int = 1


def make_softmax(spec: Softmax, name: str = "softmax") -> Any:
    """PrimFunc (x, y)."""
    arguments = [("x", spec.shape, "float32"), ("y", spec.shape, "float32")]
    return emit.prim_func(name, arguments, 1, lambda x, y: _body(spec, x, y))


def _body(spec: Softmax, x: Buffer, y: Buffer) -> None:
    lanes, columns, rows = spec.lanes, spec.shape[-1], prod(spec.shape[:-1])
    parts = -(-columns // lanes)
    source, target = emit.flat(x, (rows * columns,)), emit.flat(y, (rows * columns,))
    full, left = emit.split(columns, lanes)
    low = -T.infinity("float32")
    with loop(rows, parallel=spec.threads > 1) as row, T.sblock("row"):
        line, work = scratch((parts * lanes,)), scratch((2, lanes), registers=True)
        if full:
            with loop(full) as part:
                store(line, source[vec(row * columns + part * lanes, lanes)], vec(part * lanes, lanes))
        for lane in range(lanes if left else 0):
            value = source[row * columns + full * lanes + lane] if lane < left else low
            store(line, value, full * lanes + lane)
        _exponentials(line, work, parts, lanes)
        if full:
            with loop(full) as part:
                value = line[vec(part * lanes, lanes)] * work[1, vec(0, lanes)]
                store(target, value, vec(row * columns + part * lanes, lanes))
        for lane in range(left):
            store(target, line[full * lanes + lane] * work[1, 0], row * columns + full * lanes + lane)


def _exponentials(line: Buffer, work: Buffer, parts: int, lanes: int) -> None:
    """line = exp(line - max), work[1] = 1 / sum (NaN for a row of -inf)."""
    every = vec(0, lanes)
    store(work, splat(-T.infinity("float32"), lanes), 0, every)
    with loop(parts) as part:
        store(work, T.max(work[0, every], line[vec(part * lanes, lanes)]), 0, every)
    vectors.reduce_lanes(work, 0, vectors.maximum, lanes)
    store(work, emit.zero_for(lanes), 1, every)
    with loop(parts) as part:
        at = vec(part * lanes, lanes)
        store(line, exp(line[at] - T.max(work[0, every], splat(LOWEST, lanes)), lanes), at)
        store(work, work[1, every] + line[at], 1, every)
    vectors.reduce_lanes(work, 1, vectors.add, lanes)
    empty = work[0, every] < splat(LOWEST, lanes)
    nan = T.Broadcast(T.float32(float("nan")), lanes)
    store(work, T.Select(empty, nan, splat(1.0, lanes) / work[1, every]), 1, every)
