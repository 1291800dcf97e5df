"""Which tile each kernel uses: good defaults by shape, or what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels import amx_gemm, emit
from rewriter.runtimes.tvm.kernels.attention import Attention
from rewriter.runtimes.tvm.kernels.attention import Tile as FlashTile
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision, Tile
from rewriter.runtimes.tvm.kernels.matmul import MatMul

ACCUMULATORS = {32: 24, 16: 12}  # registers left for sums beside operands, by registers of the processor


@dataclass
class Tiles:
    """Choices for one build.

    `tuned` turns a GEMM and its default tile into a better one, `tuned_flash` an attention in a number format into its
    tile.
    """

    target: Target
    tuned: Callable[[Gemm, Tile], Tile] | None = None
    tuned_flash: Callable[[Attention, Precision], FlashTile] | None = None
    _vectors: dict[tuple[int, int, str], int] = field(default_factory=dict)

    def gemm(self, spec: Gemm) -> Tile:
        """The tile of a GEMM. Buckets of one artifact agree on the panel width, so that they share packed weights."""
        tile = default_gemm(spec, self.target)
        if self.tuned is not None:
            tile = self.tuned(spec, tile)
        vectors = self._vectors.setdefault((spec.N, spec.K, spec.precision), tile.vectors)
        if vectors == tile.vectors:
            return tile
        rows = rows_for(vectors, self.target, spec.M)
        other = Tile(rows, vectors, unroll_for(spec, rows, vectors), _block(spec, rows, self.target), tile.ahead)
        return shared(spec, other, self.target) if tile.by_rows else other

    def matmul(self, spec: MatMul) -> Tile:
        """The tile of a product of two computed matrices."""
        vectors = min(2, -(-spec.N // spec.lanes))
        return Tile(rows_for(vectors, self.target, spec.M), vectors, 4, 0, False)

    def flash(self, spec: Attention, precision: Precision = "fp32") -> FlashTile:
        """The tile of an attention: 12 x 2 with 32 registers, and keys whole while the scores of a group fit in L1."""
        if self.tuned_flash is not None:
            return self.tuned_flash(spec, precision)
        rows = max(1, min(ACCUMULATORS[self.target.registers] // 2, spec.S))
        queries = rows * max(1, min(2, spec.S // rows))
        return FlashTile(rows, 2, queries, 512 if spec.T <= 512 else 256)


def rows_for(vectors: int, target: Target, rows: int) -> int:
    """How many of `rows` rows fit into the registers beside `vectors` columns."""
    return max(1, min(ACCUMULATORS[target.registers] // vectors, rows))


def default_gemm(spec: Gemm, target: Target) -> Tile:
    """Three vectors where they divide the columns, otherwise the width that wastes least; rows balanced over M."""
    if spec.matrix_unit:
        return _matrix_gemm(spec, target)

    def waste(vectors: int) -> tuple[int, int]:
        width = vectors * spec.lanes
        return -(-spec.N // width) * width - spec.N, (3, 2, 4, 1).index(vectors)

    vectors = min((1, 2, 3, 4) if target.registers >= 32 else (1, 2, 3), key=waste)
    most = rows_for(vectors, target, spec.M)
    rows = -(-spec.M // -(-spec.M // most))
    block = _block(spec, rows, target)
    return shared(spec, Tile(rows, vectors, unroll_for(spec, rows, vectors), block, spec.M // rows >= 4), target)


def shared(spec: Gemm, tile: Tile, target: Target) -> Tile:
    """The tile with a share of the rows for each thread, where there are rows enough for all.

    Norms and roundings are shared by rows too, so a row stays in the cache of one core from kernel to kernel. Shares of
    columns cost MiniLM 40 % on two threads (measured): each kernel then reads half of its rows from the other core.
    """
    share = -(-spec.M // (spec.threads * tile.rows)) * tile.rows
    if spec.threads == 1 or share * (spec.threads - 1) >= spec.M:
        return tile
    block = _block(replace(spec, leading=(share,)), tile.rows, target) or share
    return replace(tile, block=block, by_rows=True)


def _matrix_gemm(spec: Gemm, target: Target) -> Tile:
    """Blocks of four tiles. A few of them share the fetching of a panel, and there is a next one to finish one in."""
    rows = amx_gemm.block_rows(spec.M)
    blocks = -(-spec.M // rows)
    return Tile(rows, amx_gemm.VECTORS, 1, _block(spec, rows, target), blocks >= 4, spec.N * blocks > spec.lanes * 2)


def unroll_for(spec: Gemm, rows: int, vectors: int) -> int:
    """Steps of k per turn of the loop: 8 where one kind of tile covers the matrix, else 2.

    Edge tiles are further copies of the code, and beyond a number of accesses in one function LLVM no longer keeps the
    sums in registers: with 8 steps a GEMM of 1100 columns took 1.34 times as long as with 2 (measured). 2 costs 2 %.
    """
    return 8 if spec.M % rows == 0 and spec.N % (vectors * spec.lanes) == 0 else 2


def _block(spec: Gemm, rows: int, target: Target) -> int:
    """Rows of A that take half of L2, if such a number divides M; else 0 (all), which costs 2 % at 1024 rows."""
    fitting = target.l2_bytes // (2 * 4 * spec.depth)
    tiles, rest = emit.split(spec.M, rows)
    if rest or tiles * rows <= 2 * fitting:
        return 0
    return rows * max(
        (count for count in range(1, tiles + 1) if tiles % count == 0 and count * rows <= fitting), default=0
    )
