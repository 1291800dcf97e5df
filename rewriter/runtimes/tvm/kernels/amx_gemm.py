"""The packed GEMM on matrix tiles (AMX): bfloat16 with fp32 sums, and 8-bit integers with exact 32-bit sums.

A block of C is up to 32 rows by one panel of 32 columns: four tiles of sums, two tiles of A, two of B, so that each
loaded tile is used twice. Operands are those of the vector forms with K padded to whole tiles. All blocks have the same
number of rows; the last one reaches back over rows that are computed already, so one configuration serves every M.
Finished sums leave through a staging buffer to the epilogue, row by row; with `Tile.overlap` the rows of a block are
finished between the tile instructions of the next one, because the units for tiles and vectors work side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import amx, emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, splat, vec
from rewriter.runtimes.tvm.kernels.expressions import ACTIVATIONS, coarse_gelu
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Gemm, Tile, TileWriter

LANES, VECTORS = 16, 2  # a panel is two tiles wide
MOST_ROWS = 2 * amx.ROWS
A_TILES, B_TILES = (4, 5), (6, 7)  # 0 to 3 hold sums, first those of the upper row tile


def block_rows(rows: int) -> int:
    """Rows of a block: `rows` in as few blocks as possible, shared out evenly."""
    return -(-rows // -(-rows // MOST_ROWS))


def make_gemm_amx(gemm: Gemm, tile: Tile, name: str = "gemm_amx") -> Any:
    """PrimFunc with the operands of the vector form of the same precision, rows of A and B in whole tiles of words."""
    assert gemm.matrix_unit and gemm.lanes == LANES and tile.vectors == VECTORS and tile.rows <= min(MOST_ROWS, gemm.M)
    assert not tile.by_rows, "threads share panels, each with tiles of its own"
    writer = _WRITERS[gemm.precision](gemm, tile)
    return amx.requiring(emit.prim_func(name, writer.arguments(), 1, writer.body), gemm.precision)


class _Bf16Writer(TileWriter):
    """Emits a GEMM of bfloat16. The form for bytes changes what belongs to the operands and the end of a sum."""

    words = "int32"

    def __init__(self, gemm: Gemm, tile: Tile) -> None:
        super().__init__(gemm, tile)
        upper = tile.rows if tile.rows <= amx.ROWS else -(-tile.rows // 2)
        self.row_tiles = (upper, tile.rows - upper)
        self.steps = gemm.depth // MATRIX_WORDS
        self.halves = 2 if tile.overlap else 1

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Operands of A and B, bias?, residual?, C."""
        gemm = self.gemm
        found = self._operands()
        if gemm.bias:
            found.append(("bias", (gemm.N,), "float32"))
        if gemm.residual:
            found.append(("residual", (*gemm.leading, gemm.N), "float32"))
        return [*found, ("c", (*gemm.leading, gemm.N), "float32")]

    def _operands(self) -> list[tuple[str, tuple[int, ...], str]]:
        a, b = (*self.gemm.leading, self.gemm.depth), self.gemm.packed_shape(self.tile)
        return [("a", a, "int32"), ("b", b, "int32")]

    def panels(self, first_row: Index, rows: int) -> None:
        """All column panels of `rows` rows, a run of panels for each thread; the edge panel belongs to the last run."""
        threads = self.gemm.threads
        share = -(-self.gemm.panels(self.tile) // threads)
        with loop(threads, parallel=threads > 1) as thread, T.sblock("panels"), amx.configured(self._tile_rows()):
            self.staged = emit.scratch((self.halves * self.tile.rows, self.width), self.sums)
            amx.hold(self.staged)
            self.tail: Buffer = emit.scratch((LANES,), registers=True) if self.edge % LANES else None
            first = thread * share
            count = T.max(T.min(self.full_panels - first, share), 0)
            self._sweep(first_row, rows, first, count, self.width)
            if self.edge:
                with T.If(thread == self.full_panels // share), T.Then():
                    self._sweep(first_row, rows, self.full_panels, 1, self.edge)

    def _tile_rows(self) -> list[int]:
        upper, lower = self.row_tiles
        return [upper, upper, lower, lower, upper, lower, amx.ROWS, amx.ROWS]

    def _sweep(self, first_row: Index, rows: int, first_panel: Index, count: Index, columns: int) -> None:
        """`count` panels from `first_panel`, in each all blocks of rows."""
        blocks = -(-rows // self.tile.rows)

        def place(number: Index) -> tuple[Index, Index]:
            """(first row, panel) of a block."""
            row = T.min(first_row + number % blocks * self.tile.rows, self.gemm.M - self.tile.rows)
            return row, first_panel + number // blocks

        def finish(number: Index, slot: Index) -> None:
            row, panel = place(number)
            staged = number % self.halves * self.tile.rows + slot
            for n in range(-(-columns // LANES)):
                self._finish(row + slot, panel, n, staged, columns)

        def finish_before(number: Index, step: Index) -> None:
            """Some rows of the block before; the first block writes rubbish, where its own rows come later."""
            share = -(-self.tile.rows // self.steps)
            with loop(share) as i:
                slot = step * share + i
                with T.If(slot < self.tile.rows), T.Then():
                    finish(T.max(number - 1, 0), slot)

        with loop(count * blocks) as number:
            row, panel = place(number)
            meanwhile = (lambda step: finish_before(number, step)) if self.tile.overlap else None
            self._block(row, panel, number, blocks, columns, meanwhile)
            if not self.tile.overlap:
                with loop(self.tile.rows) as slot:
                    finish(number, slot)
        if self.tile.overlap:
            with T.If(count > 0), T.Then(), loop(self.tile.rows) as slot:
                finish(count * blocks - 1, slot)

    def _block(
        self,
        row: Index,
        panel: Index,
        number: Index,
        blocks: int,
        columns: int,
        meanwhile: Callable[[Index], None] | None,
    ) -> None:
        """The sums of one block, staged."""
        sums = self._sums(columns)
        for total, _, _ in sums:
            amx.zero(total)
        with loop(self.steps) as step:
            if self.tile.ahead:
                self._fetch_ahead(panel, step, number % blocks, blocks)
            self._multiply(row, panel, step, sums)
            if meanwhile is not None:
                meanwhile(step)
        for total, i, n in sums:
            at = number % self.halves * self.tile.rows + i * self.row_tiles[0]
            amx.keep(total, T.address_of(self.staged[at, n * LANES]), 4 * self.width)

    def _sums(self, columns: int) -> list[tuple[int, int, int]]:
        """(tile, row tile, column tile) of the sums in use."""
        down, across = (2 if self.row_tiles[1] else 1), -(-columns // LANES)
        return [(i * VECTORS + n, i, n) for i in range(down) for n in range(across)]

    def _multiply(self, row: Index, panel: Index, step: Index, sums: list[tuple[int, int, int]]) -> None:
        """Products of one tile of k, each operand loaded just before its first use."""
        loaded: set[int] = set()
        k = step * MATRIX_WORDS
        for total, i, n in sums:
            a, b = A_TILES[i], B_TILES[n]
            if a not in loaded:
                amx.load(a, T.address_of(self.A[row + i * self.row_tiles[0], k]), 4 * self.gemm.depth)
            if b not in loaded:
                amx.load(b, T.address_of(self.B[panel, k, n * LANES]), 4 * self.width)
            loaded |= {a, b}
            amx.dot(total, a, b, self.gemm.precision)

    def _fetch_ahead(self, panel: Index, step: Index, part: Index, sharers: int) -> None:
        """Each block of a panel brings its part of the next panel closer."""
        lines = MATRIX_WORDS * self.width * 4 // 64
        share = -(-lines // sharers)
        for i in range(share):
            line = part * share + i
            at = self.B[panel + 1, step * MATRIX_WORDS + line // VECTORS, line % VECTORS * LANES]
            T.evaluate(
                T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(at), T.int32(0), T.int32(2), T.int32(1))
            )

    def _sum(self, row: Index, panel: Index, n: int, slot: Index, columns: int) -> Expression:
        value = self.staged[slot, vec(n * LANES, LANES)]
        return value if self.bias is None else value + self._bias(panel, n, columns)


class _Int8Writer(_Bf16Writer):
    """Unsigned bytes of A by signed ones of B; zero points and scales come in at the end."""

    sums = "int32"
    activations: ClassVar = {**ACTIVATIONS, "gelu": coarse_gelu}  # beside what the operands were rounded by

    def _operands(self) -> list[tuple[str, tuple[int, ...], str]]:
        a, b = super()._operands()
        leading, columns = self.gemm.leading, self.gemm.panels(self.tile) * self.width
        scales = [("a_scale", leading, "float32"), ("a_zero", leading, "int32")]
        return [a, *scales, b, ("b_sum", (columns,), "int32"), ("b_scale", (columns,), "float32")]

    def body(self, *buffers: Buffer) -> None:
        """See `TileWriter.body`; what belongs to rows and columns is taken out of the way first."""
        a, a_scale, a_zero, b, self.b_sum, self.b_scale, *rest = buffers
        self.a_scale = emit.flat(a_scale, (self.gemm.M,))
        self.a_zero = emit.flat(a_zero, (self.gemm.M,), "int32")
        super().body(a, b, *rest)

    def _sum(self, row: Index, panel: Index, n: int, slot: Index, columns: int) -> Expression:
        column = vec(panel * self.width + n * LANES, LANES)
        total = self.staged[slot, vec(n * LANES, LANES)] - splat(self.a_zero[row], LANES) * self.b_sum[column]
        value = T.Cast(f"float32x{LANES}", total) * (self.b_scale[column] * splat(self.a_scale[row], LANES))
        return value if self.bias is None else value + self._bias(panel, n, columns)


_WRITERS = {"bf16": _Bf16Writer, "int8": _Int8Writer}
