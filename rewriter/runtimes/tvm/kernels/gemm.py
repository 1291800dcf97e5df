"""A packed GEMM with epilogue: activation(A @ B + bias) [+ residual], any M, N, K. The fp32 form, and what all share.

B is packed once into column panels that are as wide as a register tile (rows x vectors of `lanes` floats); a panel
is reused by all row tiles while it is hot in L2, and the next panel is fetched meanwhile. Structure after
K. Goto, R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), without packing A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import ACTIVATIONS

Precision = Literal["fp32", "bf16", "int8"]
GROUP: dict[Precision, int] = {"fp32": 1, "bf16": 2, "int8": 4}  # numbers of k side by side in one 32-bit word
MATRIX_WORDS = 16  # words of k that a matrix unit takes at once: K is padded to whole steps of it


@dataclass(frozen=True)
class Tile:
    """How one GEMM is cut: a register tile of `rows` x `vectors`, `unroll` steps of k, `block` rows of A kept in L2.

    `ahead` fetches the next panel into L2 while this one is in use. Several threads share the panels, or with `by_rows`
    the blocks of rows. On a matrix unit a block of C is `rows` x
    `vectors`, `overlap` finishes it during the next one, and LLVM unrolls.
    """

    rows: int = 12
    vectors: int = 2
    unroll: int = 4
    block: int = 0
    ahead: bool = True
    overlap: bool = False
    by_rows: bool = False


@dataclass(frozen=True)
class Gemm:
    """What one GEMM computes. `leading` are the axes of A before K; their product is M.

    Operands of `precision` are 32-bit words that hold `GROUP` numbers of consecutive k each; results are fp32.
    `matrix_unit`: products on matrix tiles (AMX), for which rows of words are padded with zeros to `MATRIX_WORDS`.
    """

    leading: tuple[int, ...]
    N: int
    K: int
    bias: bool = False
    activation: str = ""
    residual: bool = False
    lanes: int = 16
    threads: int = 1
    precision: Precision = "fp32"
    matrix_unit: bool = False

    @property
    def M(self) -> int:  # noqa: N802
        """Rows."""
        return int(np.prod(self.leading, dtype=np.int64))

    @property
    def depth(self) -> int:
        """Steps of the sum: words of A per row."""
        words = -(-self.K // GROUP[self.precision])
        return words + -words % MATRIX_WORDS if self.matrix_unit else words

    def panels(self, tile: Tile) -> int:
        """Column panels, the last one padded with zeros."""
        return -(-self.N // (self.lanes * tile.vectors))

    def packed_shape(self, tile: Tile) -> tuple[int, int, int]:
        """(panels, depth, width) of the packed B, in words."""
        return self.panels(tile), self.depth, self.lanes * tile.vectors


def pack(weight_KN: NDArray[Any], width: int, group: int = 1) -> NDArray[Any]:
    """B as panels (ceil(N / width), ceil(K / group), width, group), padded with zeros; without the last axis if 1."""
    K, N = weight_KN.shape
    depth, panels = -(-K // group), -(-N // width)
    padded = np.zeros((depth * group, panels * width), weight_KN.dtype)
    padded[:K, :N] = weight_KN
    packed = padded.reshape(depth, group, panels, width).transpose(2, 0, 3, 1)
    return np.ascontiguousarray(packed[..., 0] if group == 1 else packed)


def make_gemm(gemm: Gemm, tile: Tile, name: str = "gemm") -> Any:
    """PrimFunc (A, packed B, bias?, residual?, C)."""
    arguments = [("a", (*gemm.leading, gemm.K), "float32"), ("b", gemm.packed_shape(tile), "float32")]
    if gemm.bias:
        arguments.append(("bias", (gemm.N,), "float32"))
    if gemm.residual:
        arguments.append(("residual", (*gemm.leading, gemm.N), "float32"))
    arguments.append(("c", (*gemm.leading, gemm.N), "float32"))
    return emit.prim_func(name, arguments, 1, TileWriter(gemm, tile).body)


class TileWriter:
    """Emits the statements of one GEMM, from whole matrices down to register tiles.

    Subclasses for other number formats change what a word holds: `_start`, `_product` and `_sum`.
    """

    words = sums = "float32"
    activations: ClassVar[Mapping[str, Callable[[Expression, int], Expression]]] = ACTIVATIONS

    def __init__(self, gemm: Gemm, tile: Tile) -> None:
        self.gemm, self.tile = gemm, tile
        self.width = gemm.lanes * tile.vectors
        self.full_panels, self.edge = emit.split(gemm.N, self.width)
        self.block = min(tile.block or gemm.M, gemm.M)

    def body(self, *buffers: Buffer) -> None:
        """Row blocks, in each all panels."""
        gemm = self.gemm
        rest = list(buffers)
        self.A = emit.flat(rest.pop(0), (gemm.M, gemm.depth), self.words)
        self.B = rest.pop(0)
        self.bias: Buffer = rest.pop(0) if gemm.bias else None
        self.residual: Buffer = emit.flat(rest.pop(0), (gemm.M, gemm.N)) if gemm.residual else None
        self.C = emit.flat(rest.pop(0), (gemm.M, gemm.N))
        blocks, left = emit.split(gemm.M, self.block)
        if self.tile.by_rows and gemm.threads > 1:
            self._shared(blocks, left)
            return
        if blocks:
            with loop(blocks) as block:
                self.panels(block * self.block, self.block)
        if left:
            self.panels(blocks * self.block, left)

    def _shared(self, blocks: int, left: int) -> None:
        """The blocks of rows, and the smaller last one, over the threads."""
        with loop(blocks + (left > 0), parallel=True) as block, T.sblock("rows"):
            if not left:
                self.panels(block * self.block, self.block)
                return
            with T.If(block < blocks):
                with T.Then():
                    self.panels(block * self.block, self.block)
                with T.Else():
                    self.panels(blocks * self.block, left)

    def bind(self, a: Buffer, b: Buffer, c: Buffer) -> None:
        """Use these buffers, A and C of rank 2 and B packed, with no epilogue."""
        self.A, self.B, self.C = a, b, c
        self.bias = self.residual = None

    def panels(self, first_row: Index, rows: int) -> None:
        """All column panels of `rows` rows."""
        if self.full_panels:
            with (
                loop(self.full_panels, parallel=self.gemm.threads > 1 and not self.tile.by_rows) as panel,
                T.sblock("panel"),
            ):
                self._rows(first_row, rows, panel, self.width)
        if self.edge:
            with T.sblock("edge_panel"):
                self._rows(first_row, rows, self.full_panels, self.edge)

    def _rows(self, first_row: Index, rows: int, panel: Index, columns: int) -> None:
        self.acc = emit.scratch((self.tile.rows * self.tile.vectors, self.gemm.lanes), self.sums, registers=True)
        self.tail: Buffer = emit.scratch((self.gemm.lanes,), registers=True) if columns % self.gemm.lanes else None
        full, left = emit.split(rows, self.tile.rows)
        if full:
            with loop(full) as tile:
                self._tile(first_row + tile * self.tile.rows, self.tile.rows, panel, columns, full)
        if left:
            self._tile(first_row + full * self.tile.rows, left, panel, columns, 0)

    def _tile(self, row: Index, rows: int, panel: Index, columns: int, sharers: int) -> None:
        """One register tile. Vectors with a live column are computed whole: B is zero beyond the edge."""
        lanes, unroll = self.gemm.lanes, self.tile.unroll
        vectors = -(-columns // lanes)
        for i in range(rows):
            for n in range(vectors):
                store(self.acc, self._start(row + i, panel, n, columns), i * vectors + n, vec(0, lanes))
        steps, left = emit.split(self.gemm.depth, unroll)
        if steps:
            with loop(steps) as step:
                if sharers and self.tile.ahead:
                    self._fetch(row, panel, step, sharers)
                for u in range(unroll):
                    self._step(row, rows, panel, vectors, step * unroll + u)
        if left:
            with loop(left) as k:
                self._step(row, rows, panel, vectors, steps * unroll + k)
        for i in range(rows):
            for n in range(vectors):
                self._finish(row + i, panel, n, i * vectors + n, columns)

    def _start(self, row: Index, panel: Index, n: int, columns: int) -> Expression:
        """What a sum begins with."""
        return emit.zero_for(self.gemm.lanes) if self.bias is None else self._bias(panel, n, columns)

    def _bias(self, panel: Index, n: int, columns: int) -> Expression:
        lanes = self.gemm.lanes
        if (n + 1) * lanes <= columns:
            return self.bias[vec(panel * self.width + n * lanes, lanes)]
        for t in range(columns - n * lanes):
            store(self.tail, self.bias[panel * self.width + n * lanes + t], t)
        return self.tail[vec(0, lanes)]

    def _product(self, total: Expression, a: Expression, b: Expression) -> Expression:
        """The sum after one more step: `a` is one word of A, `b` a vector of words of B."""
        return total + splat(a, self.gemm.lanes) * b

    def _sum(self, row: Index, panel: Index, n: int, slot: int, columns: int) -> Expression:
        """A finished sum as fp32, bias included."""
        return self.acc[slot, vec(0, self.gemm.lanes)]

    def _step(self, row: Index, rows: int, panel: Index, vectors: int, k: Index) -> None:
        lanes = self.gemm.lanes
        for i in range(rows):
            for n in range(vectors):
                at = (i * vectors + n, vec(0, lanes))
                b = self.B[panel, k, vec(n * lanes, lanes)]
                store(self.acc, self._product(self.acc[at], self.A[row + i, k], b), *at)

    def _fetch(self, row: Index, panel: Index, step: Index, sharers: int) -> None:
        """Each of the row tiles that share a panel brings its part of the next panel closer."""
        lines = self.width * 4 // 64
        per_step = -(-self.tile.unroll * lines // sharers)
        part = (row // self.tile.rows) % sharers
        for p in range(per_step):
            line = (step * sharers + part) * per_step + p
            address = T.address_of(self.B[panel + 1, line // lines, (line % lines) * 16])
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))

    def _finish(self, row: Index, panel: Index, n: int, slot: int, columns: int) -> None:
        lanes = self.gemm.lanes
        value = self.activations[self.gemm.activation](self._sum(row, panel, n, slot, columns), lanes)
        column = panel * self.width + n * lanes
        live = min(lanes, columns - n * lanes)
        if live == lanes:
            if self.residual is not None:
                value = value + self.residual[row, vec(column, lanes)]
            store(self.C, value, row, vec(column, lanes))
            return
        store(self.tail, value, vec(0, lanes))
        for t in range(live):
            extra = T.float32(0) if self.residual is None else self.residual[row, column + t]
            store(self.C, self.tail[t] + extra, row, column + t)
