"""Fused attention whose two products are on bfloat16: operands and probabilities rounded, sums and softmax in fp32.

Words hold pairs along what is summed: of dims for queries and keys, of tokens for probabilities and values. Dims that
fill no whole vectors are padded with zeros.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.attention import Attention, Tile
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import exp_below_one
from rewriter.runtimes.tvm.kernels.flash import FlashWriter, arguments_of
from rewriter.runtimes.tvm.kernels.gemm_bf16 import DOT, LANES, SOURCE

PAIR = 2 * LANES
ROUND_PAIR = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
EXP_DEGREE = 4  # what is rounded to 9 bits needs no more


def serves(attention: Attention) -> bool:
    """Whether this kernel can compute it: on vectors of 16 words."""
    return attention.lanes == LANES


def make_flash_bf16(attention: Attention, tile: Tile, name: str = "flash_bf16") -> Any:
    """PrimFunc (Q, K, V, bias?, kept?, sink?, O), as `make_flash`."""
    assert serves(attention) and tile.vectors % 2 == 0
    return emit.prim_func(name, arguments_of(attention), 1, Bf16FlashWriter(attention, tile).body)


def words(low: Expression, high: Expression) -> Expression:
    """32 numbers side by side as 16 words. TVM knows no vectors of bfloat16 and is told of 16-bit integers."""
    return T.reinterpret("int32x16", T.call_llvm_intrin("uint16x32", ROUND_PAIR, high, low))


def _zipped(first: Expression, second: Expression) -> Expression:
    """Words whose low halves are `first` and whose high halves are `second`."""
    pairs = [lane // 2 + (lane % 2) * LANES for lane in range(PAIR)]
    both = T.reinterpret("int16x32", words(first, second))
    return T.reinterpret("int32x16", T.Shuffle([both], pairs))


class Bf16FlashWriter(FlashWriter):
    """See `FlashWriter`; two numbers in a word."""

    multiple = 1  # pairs of dims are padded with zeros to one of it

    def body(self, *buffers: Buffer) -> None:
        """See `FlashWriter.body`; with the instruction imported."""
        with T.attr(0, "pragma_import_llvm", SOURCE):
            super().body(*buffers)

    def make_operands(self) -> None:
        """See `FlashWriter`."""
        self.pairs = -(-self.a.key.dim // (2 * self.multiple)) * self.multiple
        self.Kt = scratch((self.panels, self.pairs, self.width), "int32")
        self.Vp = scratch((self.panels * self.width // 2, self.out_vectors * LANES), "int32")
        self.Pw = scratch((self.tile.queries, self.keys // 2 + LANES), "int32")
        self.Qw = scratch((self.tile.queries, -(-self.pairs // LANES) * LANES), "int32")
        self.loose = scratch((LANES,), registers=True)

    def pack(self) -> None:
        """Keys and values of this group, rounded."""
        self._pack_keys()
        self._pack_values()

    def _row(self, source: Buffer, at: Index, start: int, dim: int) -> Expression:
        """A vector of a row of `dim` numbers that begins at `at`; zeros behind its end."""
        inside = max(0, min(LANES, dim - start))
        if inside == LANES:
            return source[vec(at + start, LANES)]
        if inside == 0:
            return emit.zero_for(LANES)
        return vectors.load_part(lambda lane: source[at + start + lane], inside, self.loose, LANES, T.float32(0))

    def _row_words(self, source: Buffer, at: Index, start: int, dim: int, scale: float) -> Expression:
        halves = []
        for half in range(2):
            value = self._row(source, at, start + half * LANES, dim)
            halves.append(T.bind(value if scale == 1.0 else value * splat(scale, LANES)))
        return words(*halves)

    def _pack_keys(self) -> None:
        """K of this head, scaled and rounded, pairs of dims transposed; beyond T the last key is repeated."""
        square = scratch((LANES, LANES), "int32", registers=True)
        a, origin = self.a, self.origin(self.a.key, self.a.key_head_of)
        with loop(self.panels * self.tile.vectors) as strip:
            for start in range(0, a.key.dim, PAIR):
                for row in range(LANES):
                    token = T.min(strip * LANES + row, a.T - 1)
                    taken = self._row_words(self.K, origin + token * a.key.token, start, a.key.dim, a.scale)
                    store(square, taken, row, vec(0, LANES))
                vectors.transpose(square, LANES)
                for row in range(min(LANES, self.pairs - start // 2)):
                    panel, column = T.floordiv(strip, self.tile.vectors), T.floormod(strip, self.tile.vectors) * LANES
                    store(self.Kt, square[row, vec(0, LANES)], panel, start // 2 + row, vec(column, LANES))

    def _pack_values(self) -> None:
        """V of this head in pairs of tokens; tokens beyond T are zero."""
        a, origin = self.a, self.origin(self.a.value, self.a.value_head_of)
        full, odd = emit.split(a.T, 2)
        for count, start, lone in ((full, 0, False), (odd, full, True)):
            if not count:
                continue
            with loop(count) as step:
                at = origin + (start + step) * (2 * a.value.token)
                for part in range(self.out_vectors):
                    first = T.bind(self._row(self.V, at, part * LANES, a.value.dim))
                    second = self._row(self.V, at + a.value.token, part * LANES, a.value.dim) if not lone else None
                    second = emit.zero_for(LANES) if second is None else second
                    store(self.Vp, _zipped(first, second), start + step, vec(part * LANES, LANES))
        padding = self.panels * self.width // 2 - full - odd
        if padding:
            with loop(padding) as step, loop(self.out_vectors) as part:
                store(self.Vp, T.Broadcast(T.int32(0), LANES), full + odd + step, vec(part * LANES, LANES))

    def take_queries(self, first: Index, count: Index) -> None:
        """Queries, rounded, as words."""
        a, origin = self.a, self.origin(self.a.query, self.a.query_head_of)
        with loop(count) as row:
            at = origin + (first + row) * a.query.token
            for start in range(0, a.query.dim, PAIR):
                taken = self._row_words(self.Q, at, start, a.query.dim, 1.0)
                store(self.Qw, taken, row, vec(start // 2, LANES))

    def score_sums(self, row: Index, rows: int, panel: Index) -> None:
        """See `FlashWriter`; two dims at a time."""
        used = self.tile.vectors
        self.clear(rows * used)
        with loop(self.pairs) as pair:
            for i in range(rows):
                for n in range(used):
                    self._add(i * used + n, self.Qw[row + i, pair], self.Kt[panel, pair, vec(n * LANES, LANES)])

    def exponentials(self, row: Index, panels: Index) -> None:
        """Rounded, in words; their sum before rounding."""
        every = vec(0, LANES)
        with loop(panels * (self.tile.vectors // 2)) as part:
            found = []
            for half in range(2):
                score = self.P[row, vec(part * PAIR + half * LANES, LANES)] - self.work[1, every]
                found.append(T.bind(exp_below_one(score, LANES, EXP_DEGREE)))
            store(self.Pw, words(*found), row, vec(part * LANES, LANES))
            store(self.work, self.work[2, every] + (found[0] + found[1]), 2, every)

    def value_sums(self, row: Index, rows: int, start: int, used: int, panel: Index, place: Index) -> None:
        """See `FlashWriter`; two tokens at a time."""
        half = self.width // 2
        with loop(half) as pair:
            for i in range(rows):
                for n in range(used):
                    right = self.Vp[panel * half + pair, vec((start + n) * LANES, LANES)]
                    self._add(i * used + n, self.Pw[row + i, place * half + pair], right)

    def _add(self, slot: int, left: Expression, right: Expression) -> None:
        total = self.acc[slot, vec(0, LANES)]
        store(self.acc, T.call_extern("float32x16", DOT, total, splat(left, LANES), right), slot, vec(0, LANES))
