"""Which tile each kernel uses: good defaults by shape, or what was measured before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels import flash, gemm, matmul

ACCUMULATORS = {32: 24, 16: 12}  # registers left for sums beside operands, by registers of the processor


@dataclass
class Tiles:
    """Choices for one build. `measured` holds tuned tiles by (M, N, K)."""

    target: Target
    measured: Mapping[tuple[int, int, int], gemm.Tile] = field(default_factory=dict)
    _widths: dict[tuple[int, int], int] = field(default_factory=dict)

    def gemm(self, spec: gemm.Gemm) -> gemm.Tile:
        """The tile of a GEMM. Buckets of one artifact agree on the panel width, so that they share packed weights."""
        tile = self.measured.get((spec.M, spec.N, spec.K)) or default_gemm(spec, self.target)
        width = self._widths.setdefault((spec.N, spec.K), tile.vectors)
        if width != tile.vectors:
            tile = gemm.Tile(rows_for(width, self.target, spec.M), width, tile.unroll, tile.block, tile.ahead)
        return tile

    def matmul(self, spec: matmul.MatMul) -> gemm.Tile:
        """The tile of a product of two computed matrices."""
        vectors = min(2, -(-spec.N // spec.lanes))
        return gemm.Tile(rows_for(vectors, self.target, spec.M), vectors, 4, 0, False)

    def flash(self, spec: flash.Attention) -> flash.Tile:
        """The tile of an attention."""
        sums = ACCUMULATORS[self.target.registers]
        rows = max(1, min(sums // 2, spec.S))
        queries = rows * max(1, min(2, spec.S // rows))
        return flash.Tile(rows, 2, queries, 512 if spec.T <= 512 else 256)


def rows_for(vectors: int, target: Target, M: int) -> int:
    """How many rows fit into the registers beside `vectors` columns."""
    return max(1, min(ACCUMULATORS[target.registers] // vectors, M))


def default_gemm(spec: gemm.Gemm, target: Target) -> gemm.Tile:
    """Three vectors where they divide the columns, otherwise the width that wastes least; rows balanced over M."""

    def waste(vectors: int) -> tuple[int, int]:
        width = vectors * spec.lanes
        return -(-spec.N // width) * width - spec.N, (3, 2, 4, 1).index(vectors)

    widths = (1, 2, 3, 4) if target.registers >= 32 else (1, 2, 3)
    vectors = min(widths, key=waste)
    most = rows_for(vectors, target, spec.M)
    rows = -(-spec.M // -(-spec.M // most))
    half_l2_rows = max(rows, target.l2_bytes // (2 * 4 * spec.K) // rows * rows)
    block = 0 if 2 * half_l2_rows >= spec.M else half_l2_rows
    return gemm.Tile(rows, vectors, 8, block, 4 * rows <= spec.M)
