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

LEVELS = 254  # steps between the least and the largest number of a row; rounding of both ends may add one
TINY = 1e-30  # the least span that a row is scaled by: rows of zeros stay zeros
_MAGIC = 1.5 * 2.0**23  # added to |v| < 2^22 it leaves round(v), ties to even, in the low bits
_MAGIC_BITS = 0x4B400000  # that number's bits


@dataclass(frozen=True)
class Quantise:
    """Rows over the last axis of `shape` in `precision`, padded to a multiple of `multiple` words.

    Padding is finite, and zero in bfloat16: rows of B that it meets are zero.

    int8: unsigned bytes ``round(x / scale + zero)``, with ``scale = (high - low) / 254`` and ``zero = round(-low /
    scale)`` per row, where low and high are the least and largest of the row and 0. `unpacked` gives the numbers that
    the words stand for, as fp32.
    """

    shape: tuple[int, ...]
    precision: Precision
    lanes: int = 16
    threads: int = 1
    unpacked: bool = False
    multiple: int = 1

    @property
    def words(self) -> tuple[int, ...]:
        """Shape of the result in 32-bit words."""
        count = -(-self.shape[-1] // GROUP[self.precision])
        return (*self.shape[:-1], count + -count % self.multiple)

    @property
    def outputs(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """(shape, dtype) of what comes out: words, and for int8 scales and zero points."""
        if self.unpacked:
            return ((self.shape, "float32"),)
        words, rows = (self.words, "int32"), self.shape[:-1]
        return (words, (rows, "float32"), (rows, "int32")) if self.precision == "int8" else (words,)


def make_quantise(spec: Quantise, name: str = "quantise") -> Any:
    """PrimFunc (x, *outputs)."""
    outputs = [(f"y{index}", shape, dtype) for index, (shape, dtype) in enumerate(spec.outputs)]
    return emit.prim_func(name, [("x", spec.shape, "float32"), *outputs], len(outputs), lambda *b: _body(spec, *b))


def _body(spec: Quantise, x: Buffer, *outputs: Buffer) -> None:
    rows, columns = prod(spec.shape[:-1]), spec.shape[-1]
    source = emit.flat(x, (rows, columns))
    with loop(rows, parallel=spec.threads > 1) as row, T.sblock("row"):
        writer = RowWriter(spec, *outputs)
        writer.row(row, lambda at, lane: source[row, at + lane], lambda at: source[row, vec(at, spec.lanes)])


class RowWriter:
    """Writes one row after the other, from wherever its numbers are. Made inside the block that holds its scratch."""

    def __init__(
        self, spec: Quantise, words: Buffer, scales: Buffer | None = None, zeros: Buffer | None = None
    ) -> None:
        self.spec, self.lanes, self.columns = spec, spec.lanes, spec.shape[-1]
        rows, packed = prod(spec.shape[:-1]), "uint8" if spec.precision == "int8" else "uint16"
        self.held = self.columns if spec.unpacked else spec.words[-1] * GROUP[spec.precision]
        self.dtype = "float32" if spec.unpacked else packed
        self.target = T.decl_buffer((rows, self.held), self.dtype, data=words.data)
        self.scales = None if scales is None else emit.flat(scales, (rows,))
        self.zeros = None if zeros is None else emit.flat(zeros, (rows,), "int32")
        self.work = scratch((3, self.lanes), registers=True)
        self.tail = scratch((self.lanes,), registers=True)

    def row(self, row: Index, lane: Callable[[Index, int], Expression], whole: Callable[[Index], Expression]) -> None:
        """One row: `whole(at)` is a vector from column `at`, `lane(at, i)` one number of it."""
        if self.spec.precision == "bf16":
            self._over(row, lane, whole, _bf16_numbers if self.spec.unpacked else _bf16_bits)
            return
        every, full, left = vec(0, self.lanes), *emit.split(self.columns, self.lanes)
        for slot in (0, 1):
            store(self.work, emit.zero_for(self.lanes), slot, every)
        if full:
            with loop(full) as part:
                self._widen(whole(part * self.lanes))
        if left:
            part_of = vectors.load_part(lambda i: lane(full * self.lanes, i), left, self.tail, self.lanes, T.float32(0))
            self._widen(part_of)
        vectors.reduce_lanes(self.work, 0, vectors.maximum, self.lanes)
        vectors.reduce_lanes(self.work, 1, vectors.minimum, self.lanes)
        self._scale(row)
        self._over(row, lane, whole, self._bytes)

    def _widen(self, value: Expression) -> None:
        """Slots 0 and 1: the largest and the least number so far."""
        every = vec(0, self.lanes)
        store(self.work, T.max(self.work[0, every], value), 0, every)
        store(self.work, T.min(self.work[1, every], value), 1, every)

    def _scale(self, row: Index) -> None:
        """Slots 0 to 2: steps per unit, what is added to round (the zero point beside the constant), the scale."""
        every, lanes = vec(0, self.lanes), self.lanes
        span = T.max(self.work[0, every] - self.work[1, every], splat(TINY, lanes))
        store(self.work, span / splat(float(LEVELS), lanes), 2, every)
        store(self.work, splat(float(LEVELS), lanes) / span, 0, every)
        added = splat(_MAGIC, lanes) - self.work[1, every] * self.work[0, every]
        store(self.work, added, 1, every)
        if self.scales is not None and self.zeros is not None:
            store(self.scales, self.work[2, 0], row)
            store(self.zeros, T.reinterpret("int32", self.work[1, 0]) - T.int32(_MAGIC_BITS), row)

    def _bytes(self, v: Expression, lanes: int) -> Expression:
        """The low bytes of a sum whose last bit counts ones: round(v / scale + zero)."""
        every = vec(0, lanes)
        bits = T.reinterpret(f"int32x{lanes}", v * self.work[0, every] + self.work[1, every])
        if not self.spec.unpacked:
            return T.Cast(f"uint8x{lanes}", bits)
        zero = T.reinterpret(f"int32x{lanes}", self.work[1, every])
        return T.Cast(f"float32x{lanes}", bits - zero) * self.work[2, every]

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
        if left:
            self._last(row, lane, convert, full * lanes, left)
        # Beyond the vector that holds the last number, whole vectors of zeros: rows are padded to `multiple` words.
        for at in range(-(-self.columns // lanes) * lanes, self.held, lanes):
            count = min(lanes, self.held - at)
            store(self.target, splat(T.Cast(self.dtype, 0), count), row, vec(at, count))

    def _last(
        self,
        row: Index,
        lane: Callable[[Index, int], Expression],
        convert: Callable[[Expression, int], Expression],
        at: int,
        left: int,
    ) -> None:
        """The numbers that fill no vector."""
        lanes = self.lanes
        rest = vectors.load_part(lambda i: lane(at, i), left, self.tail, lanes, T.float32(0))
        converted = scratch((lanes,), self.dtype, registers=True)
        store(converted, convert(rest, lanes), vec(0, lanes))
        for i in range(min(lanes, self.held - at)):
            store(self.target, converted[i], row, at + i)


def _bf16_bits(v: Expression, lanes: int) -> Expression:
    """The upper half after rounding to nearest, ties to even; NaN keeps its upper half, with the quiet bit."""

    def every(value: int) -> Expression:
        return T.Broadcast(T.uint32(value), lanes)

    bits = T.reinterpret(f"uint32x{lanes}", v)
    upper = T.shift_right(bits, every(16))
    rounded = T.shift_right(bits + every(0x7FFF) + T.bitwise_and(upper, every(1)), every(16))
    is_nan = T.bitwise_and(bits, every(0x7FFFFFFF)) > every(0x7F800000)
    return T.Cast(f"uint16x{lanes}", T.Select(is_nan, T.bitwise_or(upper, every(0x40)), rounded))


def _bf16_numbers(v: Expression, lanes: int) -> Expression:
    bits = T.shift_left(T.Cast(f"uint32x{lanes}", _bf16_bits(v, lanes)), T.Broadcast(T.uint32(16), lanes))
    return T.reinterpret(f"float32x{lanes}", bits)
