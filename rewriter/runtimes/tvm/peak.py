"""What this processor can do at most, measured: products from the first-level cache, and bytes from memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx_peak
from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, splat, store, vec
from rewriter.runtimes.tvm.kernels.gemm import GROUP, Precision
from rewriter.runtimes.tvm.kernels.gemm_bf16 import DOT, SOURCE
from rewriter.runtimes.tvm.kernels.gemm_int8 import INTRINSIC
from rewriter.runtimes.tvm.space import compiled
from rewriter.runtimes.tvm.tiles import ACCUMULATORS

_DEPTH = 32  # words of k: operands of a few KB
_REPEATS = 2000
_VECTORS = 2
_COPIED_BYTES = 128 << 20
_TURNS = 9


def products_per_s(target: Target, precision: Precision) -> float:
    """Operations (two per product) per second of all threads, sums in registers and operands in the first-level cache.

    Of the matrix unit where there is one, else on vectors. Without an instruction for the format, that of fp32.
    """
    if target.has_matrix_unit(precision):
        return amx_peak.products_per_s(target, precision)
    precision = precision if target.multiplies(precision) else "fp32"
    return target.threads * _of_one_core(precision, target.vector_floats, target.registers, _Frozen(target))


class _Frozen:
    """A target as an argument that is the same for every target of one machine: its code is."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __hash__(self) -> int:
        return hash(self.target.mcpu)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.target.mcpu == self.target.mcpu


@cache
def _of_one_core(precision: Precision, lanes: int, registers: int, machine: _Frozen) -> float:
    rows = ACCUMULATORS[registers] // _VECTORS
    kernel = compiled(_kernel(precision, lanes, rows), machine.target)
    dtype = "float32" if precision == "fp32" else "int32"
    arrays = [np.ones((rows, _DEPTH), dtype), np.ones((_DEPTH, _VECTORS * lanes), dtype)]
    sums = np.zeros((rows, _VECTORS * lanes), _sums(precision))
    operands = [tvm.runtime.tensor(array) for array in (*arrays, sums)]
    best = min(_of(lambda: kernel(*operands)) for _ in range(_TURNS))
    return 2.0 * _REPEATS * rows * _VECTORS * lanes * _DEPTH * GROUP[precision] / best


def _sums(precision: Precision) -> str:
    return "int32" if precision == "int8" else "float32"


def _kernel(precision: Precision, lanes: int, rows: int) -> Any:
    """One register tile of sums, over the same few operands again and again."""
    words = "float32" if precision == "fp32" else "int32"

    def product(total: Expression, a: Expression, b: Expression) -> Expression:
        if precision == "fp32":
            return total + splat(a, lanes) * b
        if precision == "bf16":
            return T.call_extern("float32x16", DOT, total, splat(a, lanes), b)
        left, right = (T.reinterpret("int8x64", part) for part in (splat(a, lanes), b))
        return T.call_llvm_intrin("int32x16", INTRINSIC, total, left, right)

    def body(a: Buffer, b: Buffer, c: Buffer) -> None:
        sums = emit.scratch((rows * _VECTORS, lanes), _sums(precision), registers=True)
        slots = [(row, n, (row * _VECTORS + n, vec(0, lanes))) for row in range(rows) for n in range(_VECTORS)]
        for row, n, slot in slots:
            store(sums, c[row, vec(n * lanes, lanes)], *slot)
        with emit.loop(_REPEATS), emit.loop(_DEPTH) as k:
            for row, n, slot in slots:
                store(sums, product(sums[slot], a[row, k], b[k, vec(n * lanes, lanes)]), *slot)
        for row, n, slot in slots:
            store(c, sums[slot], row, vec(n * lanes, lanes))

    def with_source(*buffers: Buffer) -> None:
        with T.attr(0, "pragma_import_llvm", SOURCE):
            body(*buffers)

    width = _VECTORS * lanes
    arguments = [("a", (rows, _DEPTH), words), ("b", (_DEPTH, width), words), ("c", (rows, width), _sums(precision))]
    return emit.prim_func("peak", arguments, 1, with_source if precision == "bf16" else body)


def bytes_per_s() -> float:
    """Bytes read and written per second by copying an array that no cache holds; one thread."""
    source, copy = np.ones(_COPIED_BYTES, np.uint8), np.empty(_COPIED_BYTES, np.uint8)
    return 2.0 * _COPIED_BYTES / min(_of(lambda: np.copyto(copy, source)) for _ in range(_TURNS))


def _of(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun
