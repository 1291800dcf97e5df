"""Fused attention whose two products run on matrix tiles (AMX): the bfloat16 form with tiles in place of vectors.

Both products read what the vector form packs: queries and exponentials are rows of words, keys and values are words of
two dims or two tokens by columns. Tiles always have 16 rows; where fewer queries are left, the rows behind them are
computed on what happens to be there and never read.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import amx, emit, flash_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Tile
from rewriter.runtimes.tvm.kernels.emit import Index, loop, scratch
from rewriter.runtimes.tvm.kernels.flash import arguments_of
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS

LANES, VECTORS = 16, 2  # a panel is two tiles of keys
KEYS = 256  # of a block: scores and exponentials of 32 queries stay near the first-level cache
A_TILES, B_TILES = (4, 5), (6, 7)


def serves(attention: Attention) -> bool:
    """Whether tiles pay: a query alone, as in decoding, would fill one row of sixteen."""
    return flash_bf16.serves(attention) and attention.S >= amx.ROWS


def tile_for(attention: Attention) -> Tile:
    """Two row tiles of queries at a time, or one where there are no more."""
    rows = amx.ROWS if attention.S <= amx.ROWS else 2 * amx.ROWS
    return Tile(rows, VECTORS, rows, KEYS)


def make_flash_amx(attention: Attention, tile: Tile, name: str = "flash_amx_bf16") -> Any:
    """PrimFunc (Q, K, V, bias?, kept?, sink?, O), as `make_flash`."""
    assert serves(attention) and tile.vectors == VECTORS
    assert tile.rows in (amx.ROWS, 2 * amx.ROWS) and tile.queries % tile.rows == 0
    return amx.requiring(emit.prim_func(name, arguments_of(attention), 1, _Writer(attention, tile).body), "bf16")


class _Writer(flash_bf16.Bf16FlashWriter):
    multiple = MATRIX_WORDS

    def _make_scratch(self) -> None:
        super()._make_scratch()
        # Tiles are stored to memory, of which whole rows are read back.
        self.acc = scratch((self.tile.rows * VECTORS, LANES))
        amx.hold(self.acc, self.partial, self.Qw, self.Pw, self.Kt, self.Vp)

    def _queries(self, part: Index) -> None:
        with amx.configured([amx.ROWS] * amx.TILES):
            super()._queries(part)

    def score_sums(self, row: Index, rows: int, panel: Index) -> None:
        """See `FlashWriter`."""
        sums = _sums(rows, VECTORS)
        stride = 4 * int(self.Qw.shape[1])
        for total, _, _ in sums:
            amx.zero(total)
        with loop(self.pairs // MATRIX_WORDS) as step:
            k = step * MATRIX_WORDS
            for i in range(_down(rows)):
                amx.load(A_TILES[i], T.address_of(self.Qw[row + i * amx.ROWS, k]), stride)
            for n in range(VECTORS):
                amx.load(B_TILES[n], T.address_of(self.Kt[panel, k, n * LANES]), 4 * self.width)
            for total, i, n in sums:
                amx.dot(total, A_TILES[i], B_TILES[n], "bf16")
        for total, i, n in sums:
            amx.keep(total, T.address_of(self.acc[i * amx.ROWS * VECTORS + n, 0]), 4 * self.width)

    def _values(self, row: Index, rows: int, begin: Index, panels: Index) -> None:
        """partial[row : row + rows] (+)= P V, two vectors of V at a time."""
        across, stride, half = 4 * self.out_vectors * LANES, 4 * int(self.Pw.shape[1]), self.width // 2
        for start, used in emit.tiles(self.out_vectors, VECTORS):
            sums = _sums(rows, used)
            places = [T.address_of(self.partial[row + i * amx.ROWS, (start + n) * LANES]) for _, i, n in sums]
            for (total, _, _), place in zip(sums, places, strict=True):
                if self.running:
                    amx.load(total, place, across)
                else:
                    amx.zero(total)
            with loop(panels) as place:
                panel = T.bind(self._panel(begin + place))
                for i in range(_down(rows)):
                    amx.load(A_TILES[i], T.address_of(self.Pw[row + i * amx.ROWS, place * half]), stride)
                for n in range(used):
                    amx.load(B_TILES[n], T.address_of(self.Vp[panel * half, (start + n) * LANES]), across)
                for total, i, n in sums:
                    amx.dot(total, A_TILES[i], B_TILES[n], "bf16")
            for (total, _, _), place in zip(sums, places, strict=True):
                amx.keep(total, place, across)


def _down(rows: int) -> int:
    return -(-rows // amx.ROWS)


def _sums(rows: int, across: int) -> list[tuple[int, int, int]]:
    """(tile, row tile, column tile) of the sums in use."""
    return [(i * VECTORS + n, i, n) for i in range(_down(rows)) for n in range(across)]
