"""The space of one GEMM: register tile, unrolling, fetching ahead, blocks of rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rewriter.core.target import Target
from rewriter.runtimes.tvm import reference
from rewriter.runtimes.tvm.database import Subject
from rewriter.runtimes.tvm.kernels import formats
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Gemm, Tile
from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
from rewriter.runtimes.tvm.space import MOST_SETS, ROTATED_BYTES, compiled, source_version
from rewriter.runtimes.tvm.tiles import default_gemm, shared, unroll_for

# Rows and vectors of register tiles whose sums fit beside the operands, by registers of the processor.
SHAPES = {
    32: ((8, 3), (12, 2), (6, 4), (9, 3), (13, 2), (24, 1)),
    16: ((6, 2), (4, 3), (5, 2), (12, 1), (3, 4)),
}
FEW_ROWS, WIDE = 4, ((4, 6), (3, 8))  # a few rows have registers to spare for wide panels
SHORT = 48  # rows below which fetching ahead is as likely to help as to hurt
MOST_WASTE = 1.34  # columns computed for one that is there
FLIP_COST, UNROLL_COST = 1.02, 1.03  # guesses of the model: what prefetching and unrolling otherwise do at most
BYTES_PER_CYCLE = 8.0  # of one core from memory


@dataclass(frozen=True)
class GemmSpace:
    """One GEMM on one target, its `default` tile among the choices."""

    spec: Gemm
    target: Target
    default: Tile

    @classmethod
    def of(cls, spec: Gemm, target: Target) -> GemmSpace:
        """With the default tile of its shape."""
        return cls(spec, target, default_gemm(spec, target))

    @property
    def subject(self) -> Subject:
        """By format, epilogue, rows, columns and depth."""
        spec = self.spec
        kernel = f"gemm:{spec.activation}:{int(spec.bias)}:{int(spec.residual)}{':amx' * spec.matrix_unit}"
        names = ("emit", "expressions", "gemm", "gemm_bf16", "gemm_int8", "amx", "amx_gemm")
        return Subject.of(kernel, (spec.M, spec.N, spec.K), self.target, spec.precision, source_version(*names))

    def choices(self) -> list[Tile]:
        """The default, then all others, those first that the model finds fastest."""
        default = self.default
        if self.spec.matrix_unit:
            forms = itertools.product((default.ahead, not default.ahead), (default.overlap, not default.overlap))
            return [replace(default, ahead=ahead, overlap=overlap) for ahead, overlap in forms]
        shapes = [default, *self._shapes()]
        found = [tile for shape in shapes for tile in (shape, replace(shape, ahead=not shape.ahead))]
        found += [replace(default, unroll=steps) for steps in (2, 4, 8)]
        found += [replace(tile, block=0) for tile in shapes[:2] if tile.block and not tile.by_rows]
        others = [tile for tile in dict.fromkeys(found) if tile != default]
        return [default, *sorted(others, key=self.predicted)]

    def _shapes(self) -> list[Tile]:
        """Other register tiles, rows balanced over M.

        What the threads divide stays: which core holds which rows decides about the next kernel, not about this one.
        """
        spec, found = self.spec, []
        wide = WIDE if spec.M <= FEW_ROWS and self.target.registers >= 32 else ()
        for most, vectors in (*SHAPES[self.target.registers], *wide):
            rows = -(-spec.M // -(-spec.M // most))
            width = vectors * spec.lanes
            if -(-spec.N // width) * width <= MOST_WASTE * spec.N:
                plain = replace(self.default, rows=rows, vectors=vectors, unroll=unroll_for(spec, rows, vectors))
                by_rows = shared(spec, replace(plain, block=0, by_rows=False), self.target)
                found.append(by_rows if self.default.by_rows else plain)
        return found

    def predicted(self, tile: Tile) -> float:
        """Cycles by a roofline of one core: two products and two loads of vectors per cycle at best, B from memory."""
        spec = self.spec
        full, left = divmod(spec.M, tile.rows)
        panels = spec.panels(tile)

        def step(rows: int) -> float:
            # A product waits four cycles for the one before it, so fewer than eight sums leave gaps.
            return max(rows * tile.vectors / 2.0, (tile.vectors + rows) / 2.0, 4.0 if rows * tile.vectors < 8 else 0.0)

        compute = spec.depth * panels * (full * step(tile.rows) + (step(left) if left else 0.0))
        memory = 4.0 * spec.depth * panels * spec.lanes * tile.vectors / BYTES_PER_CYCLE
        guess = (FLIP_COST if tile.ahead != self.default.ahead and spec.M >= SHORT else 1.0) * (
            UNROLL_COST if tile.unroll != unroll_for(spec, tile.rows, tile.vectors) else 1.0
        )
        return max(compute / spec.threads, memory) * guess

    def choice(self, fields: Mapping[str, Any]) -> Tile:
        """A tile from its fields."""
        return Tile(**fields)

    def run(self, choice: Tile) -> GemmRun:
        """See `Space.run`."""
        return GemmRun(self.spec, choice, self.target)


class GemmRun:
    """One compiled tile with rotating weights."""

    def __init__(self, spec: Gemm, tile: Tile, target: Target, rotate: bool = True) -> None:
        self.spec, rng = spec, np.random.default_rng(0)
        words = 4 * spec.depth * spec.panels(tile) * spec.lanes * tile.vectors
        self.sets = max(2, min(MOST_SETS, ROTATED_BYTES // words)) if rotate else 1
        self._function = compiled(formats.make(spec, tile), target)
        self._a = rng.standard_normal((*spec.leading, spec.K), np.float32)
        self._weight = rng.standard_normal((spec.K, spec.N), np.float32) / np.float32(spec.K**0.5)
        self._bias = rng.standard_normal(spec.N, np.float32) if spec.bias else None
        self._residual = rng.standard_normal((*spec.leading, spec.N), np.float32) if spec.residual else None
        width = tile.vectors * spec.lanes
        packed = formats.weight_operands(self._weight, spec.precision, spec.precision, width, spec.matrix_unit)
        left = _activations(spec, self._a, target)
        rest = [tvm.runtime.tensor(array) for array in (self._bias, self._residual) if array is not None]
        self._out = tvm.runtime.tensor(np.full((*spec.leading, spec.N), np.nan, np.float32))
        # Other memory, the same numbers: only where they lie decides how long they take.
        self._arguments = [
            (*left, *(tvm.runtime.tensor(part) for part in packed), *rest, self._out) for _ in range(self.sets)
        ]

    def error(self) -> float:
        """Against numpy; see `Run.error`."""
        self._function(*self._arguments[0])
        wanted = reference.gemm(self.spec, self._a, self._weight, self._bias, self._residual)
        return float(np.abs(self._out.numpy() - wanted).max()) / reference.TOLERANCE[self.spec.precision]

    def seconds(self, index: int) -> float:
        """One run on one set of weights."""
        begun = perf_counter()
        self._function(*self._arguments[index])
        return perf_counter() - begun


def _activations(spec: Gemm, a: NDArray[np.float32], target: Target) -> list[Any]:
    """The operands that a kernel of this format takes for A."""
    if spec.precision == "fp32":
        return [tvm.runtime.tensor(a)]
    rounding = Quantise(a.shape, spec.precision, spec.lanes, multiple=MATRIX_WORDS if spec.matrix_unit else 1)
    if rounding not in _rounding:
        # The tiles of a shape share it, and the next shape needs another.
        _rounding.clear()
        _rounding[rounding] = compiled(make_quantise(rounding), target)
    outputs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in rounding.outputs]
    _rounding[rounding](tvm.runtime.tensor(a), *outputs)
    return outputs


_rounding: dict[Quantise, Any] = {}
