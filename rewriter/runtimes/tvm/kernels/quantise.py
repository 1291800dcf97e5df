"""Activations as the words that GEMMs of bfloat16 and 8-bit integers read: one pass over rows that lie in L1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.gemm import GROUP, Precision
from rewriter.runtimes.tvm.kernels.gemm_int8 import LEVELS, ZERO_POINT

TINY = 1e-30  # the least magnitude that a row is scaled by: rows of zeros stay zeros
_MAGIC = 1.5 * 2.0**23  # added to |v| < 2^22 it leaves round(v), ties to even, in the low bits


@dataclass(frozen=True)
class Quantise:
    """Rows over the last axis of `shape` in `precision`, padded to whole words.

    int8: ``round(x * (127 / max|x|)) + 128`` as unsigned bytes, and ``max|x| / 127``, per row.
    """

    shape: tuple[int, ...]
    precision: Precision
    lanes: int = 16
    threads: int = 1

    @property
    def words(self) -> tuple[int, ...]:
        """Shape of the result in 32-bit words."""
        return (*self.shape[:-1], -(-self.shape[-1] // GROUP[self.precision]))


def make_quantise(spec: Quantise, name: str = "quantise") -> Any:
    """PrimFunc (x, words, scales?): the scales only for int8."""
    outputs = [("words", spec.words, "int32")]
    if spec.precision == "int8":
        outputs.append(("scales", spec.shape[:-1], "float32"))
    return emit.prim_func(name, [("x", spec.shape, "float32"), *outputs], len(outputs), lambda *b: _body(spec, *b))


def _body(spec: Quantise, x: Buffer, words: Buffer, scales: Buffer | None = None) -> None:
    rows, columns = prod(spec.shape[:-1]), spec.shape[-1]
    source = emit.flat(x, (rows, columns))
    with loop(rows, parallel=spec.threads > 1) as row, T.sblock("row"):
        writer = RowWriter(spec, words, scales)
        writer.row(row, lambda at, lane: source[row, at + lane], lambda at: source[row, vec(at, spec.lanes)])


class RowWriter:
    """Writes one row after the other, from wherever its numbers are. Made inside the block that holds its scratch."""

    def __init__(self, spec: Quantise, words: Buffer, scales: Buffer | None) -> None:
        self.spec, self.lanes, self.columns = spec, spec.lanes, spec.shape[-1]
        rows, dtype = prod(spec.shape[:-1]), "uint8" if spec.precision == "int8" else "uint16"
        self.held = spec.words[-1] * GROUP[spec.precision]
        self.target = T.decl_buffer((rows, self.held), dtype, data=words.data)
        self.scales = None if scales is None else emit.flat(scales, (rows,))
        self.work = scratch((1, self.lanes), registers=True)
        self.tail = scratch((self.lanes,), registers=True)

    def row(self, row: Index, lane: Callable[[Index, int], Expression], whole: Callable[[Index], Expression]) -> None:
        """One row: `whole(at)` is a vector from column `at`, `lane(at, i)` one number of it."""
        if self.scales is None:
            self._over(row, lane, whole, _bf16_bits)
            return
        every = vec(0, self.lanes)
        store(self.work, splat(TINY, self.lanes), 0, every)
        full, left = emit.split(self.columns, self.lanes)
        if full:
            with loop(full) as part:
                store(self.work, T.max(self.work[0, every], _magnitude(whole(part * self.lanes), self.lanes)), 0, every)
        if left:
            rest = vectors.load_part(lambda i: lane(full * self.lanes, i), left, self.tail, self.lanes, T.float32(0))
            store(self.work, T.max(self.work[0, every], _magnitude(rest, self.lanes)), 0, every)
        vectors.reduce_lanes(self.work, 0, vectors.maximum, self.lanes)
        store(self.scales, self.work[0, 0] * T.float32(1.0 / LEVELS), row)
        store(self.work, splat(float(LEVELS), self.lanes) / self.work[0, every], 0, every)
        self._over(row, lane, whole, lambda v, lanes: _levels(v * self.work[0, every], lanes))

    def _over(
        self,
        row: Index,
        lane: Callable[[Index, int], Expression],
        whole: Callable[[Index], Expression],
        convert: Callable[[Expression, int], Expression],
    ) -> None:
        lanes = self.lanes
        full, left = emit.split(self.columns, lanes)
        if full:
            with loop(full) as part:
                store(self.target, convert(whole(part * lanes), lanes), row, vec(part * lanes, lanes))
        if not left:
            return
        rest = vectors.load_part(lambda i: lane(full * lanes, i), left, self.tail, lanes, T.float32(0))
        converted = scratch((lanes,), self.target.dtype, registers=True)
        store(converted, convert(rest, lanes), vec(0, lanes))
        for i in range(self.held - full * lanes):
            store(self.target, converted[i], row, full * lanes + i)


def _magnitude(v: Expression, lanes: int) -> Expression:
    return T.max(v, splat(0.0, lanes) - v)


def _levels(v: Expression, lanes: int) -> Expression:
    """round(v) + 128 as unsigned bytes: the low byte of the sum with a number whose last bit counts ones."""
    bits = T.reinterpret(f"int32x{lanes}", v + splat(_MAGIC + ZERO_POINT, lanes))
    return T.Cast(f"uint8x{lanes}", bits)


def _bf16_bits(v: Expression, lanes: int) -> Expression:
    """The upper half after rounding to nearest, ties to even; NaN keeps its upper half, with the quiet bit."""

    def every(value: int) -> Expression:
        return T.Broadcast(T.uint32(value), lanes)

    bits = T.reinterpret(f"uint32x{lanes}", v)
    upper = T.shift_right(bits, every(16))
    rounded = T.shift_right(bits + every(0x7FFF) + T.bitwise_and(upper, every(1)), every(16))
    is_nan = T.bitwise_and(bits, every(0x7FFFFFFF)) > every(0x7F800000)
    return T.Cast(f"uint16x{lanes}", T.Select(is_nan, T.bitwise_or(upper, every(0x40)), rounded))
