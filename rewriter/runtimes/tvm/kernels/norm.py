"""Layer norm and RMS norm over the last axis, after an optional residual addition, row by row in L1."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec


@dataclass(frozen=True)
class Norm:
    """normalised(x [+ residual]) * gain [+ bias]; with `keep_sum` the sum is a second output."""

    shape: tuple[int, ...]
    epsilon: float
    kind: Literal["layer", "rms"] = "layer"
    bias: bool = True
    residual: bool = False
    keep_sum: bool = False
    lanes: int = 16
    threads: int = 1


def make_norm(norm: Norm, name: str = "norm") -> Any:
    """PrimFunc (x, residual?, gain, bias?, y, sum?)."""
    channels = norm.shape[-1]
    arguments = [("x", norm.shape, "float32")]
    if norm.residual:
        arguments.append(("residual", norm.shape, "float32"))
    arguments.append(("gain", (channels,), "float32"))
    if norm.bias:
        arguments.append(("bias", (channels,), "float32"))
    outputs = [("y", norm.shape, "float32")] + ([("sum", norm.shape, "float32")] if norm.keep_sum else [])
    return emit.prim_func(name, [*arguments, *outputs], len(outputs), _Writer(norm).body)


class _Writer:
    """Emits the statements of one norm."""

    def __init__(self, norm: Norm) -> None:
        self.norm, self.lanes, self.channels = norm, norm.lanes, norm.shape[-1]
        self.rows = prod(norm.shape[:-1])
        self.full, self.left = emit.split(self.channels, norm.lanes)

    def body(self, *buffers: Buffer) -> None:
        """One row after the other."""
        rest, shape = list(buffers), (self.rows, self.channels)
        self.X = emit.flat(rest.pop(0), shape)
        self.R = emit.flat(rest.pop(0), shape) if self.norm.residual else None
        self.gain = rest.pop(0)
        self.bias = rest.pop(0) if self.norm.bias else None
        self.Y = emit.flat(rest.pop(0), shape)
        self.sum = emit.flat(rest.pop(0), shape) if self.norm.keep_sum else None
        with loop(self.rows, parallel=self.norm.threads > 1) as row, T.sblock("row"):
            self.line = scratch((self.channels + self.lanes,))
            self.work = scratch((3, self.lanes), registers=True)
            self.tail = scratch((self.lanes,), registers=True)
            self._row(row)

    def _row(self, row: Index) -> None:
        lanes, all_lanes = self.lanes, vec(0, self.lanes)
        for slot in range(2):
            store(self.work, emit.zero_for(lanes), slot, all_lanes)
        self._over(lambda at, live: self._gather(row, at, live))
        if self.norm.kind == "layer":
            vectors.reduce_lanes(self.work, 0, vectors.add, lanes)
            store(self.work, self.work[0, all_lanes] * splat(1.0 / self.channels, lanes), 0, all_lanes)
        self._over(self._squares)
        vectors.reduce_lanes(self.work, 1, vectors.add, lanes)
        mean_square = self.work[1, all_lanes] * splat(1.0 / self.channels, lanes) + splat(self.norm.epsilon, lanes)
        store(self.work, splat(1.0, lanes) / T.sqrt(mean_square), 1, all_lanes)
        self._over(lambda at, live: self._write(row, at, live))

    def _over(self, act: Any) -> None:
        if self.full:
            with loop(self.full) as part:
                act(part * self.lanes, self.lanes)
        if self.left:
            act(self.full * self.lanes, self.left)

    def _gather(self, row: Index, at: Index, live: int) -> None:
        """line = x + residual, and the running sum."""
        lanes = self.lanes
        value = self._load(self.X, row, at, live)
        if self.R is not None:
            store(self.line, value, vec(at, lanes))
            value = self.line[vec(at, lanes)] + self._load(self.R, row, at, live)
        store(self.line, value, vec(at, lanes))
        value = self.line[vec(at, lanes)]
        if self.sum is not None:
            self._save(self.sum, value, row, at, live)
        if self.norm.kind == "layer":
            store(self.work, self.work[0, vec(0, lanes)] + value, 0, vec(0, lanes))

    def _squares(self, at: Index, live: int) -> None:
        """line = line - mean (0 beyond the edge), and the running sum of squares."""
        lanes, all_lanes = self.lanes, vec(0, self.lanes)
        if self.norm.kind == "layer":
            centred = self.line[vec(at, lanes)] - self.work[0, all_lanes]
            if live < lanes:
                inside = T.Ramp(T.int32(0), 1, lanes) < T.Broadcast(T.int32(live), lanes)
                centred = T.Select(inside, centred, emit.zero_for(lanes))
            store(self.line, centred, vec(at, lanes))
        value = self.line[vec(at, lanes)]
        store(self.work, self.work[1, all_lanes] + value * value, 1, all_lanes)

    def _write(self, row: Index, at: Index, live: int) -> None:
        lanes = self.lanes
        value = self.line[vec(at, lanes)] * self.work[1, vec(0, lanes)]
        store(self.line, value * self._vector(self.gain, at, live), vec(at, lanes))
        value = self.line[vec(at, lanes)]
        if self.bias is not None:
            value = value + self._vector(self.bias, at, live)
        self._save(self.Y, value, row, at, live)

    def _load(self, source: Buffer, row: Index, at: Index, live: int) -> Expression:
        if live == self.lanes:
            return source[row, vec(at, live)]
        return vectors.load_part(lambda lane: source[row, at + lane], live, self.tail, self.lanes, T.float32(0))

    def _vector(self, source: Buffer, at: Index, live: int) -> Expression:
        if live == self.lanes:
            return source[vec(at, live)]
        return vectors.load_part(lambda lane: source[at + lane], live, self.tail, self.lanes, T.float32(0))

    def _save(self, target: Buffer, value: Expression, row: Index, at: Index, live: int) -> None:
        if live == self.lanes:
            store(target, value, row, vec(at, live))
            return
        store(self.tail, value, vec(0, self.lanes))
        for lane in range(live):
            store(target, self.tail[lane], row, at + lane)
