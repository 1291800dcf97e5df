"""Fused attention whose two products are on bfloat16: operands and probabilities rounded, sums and softmax in fp32.

Words hold pairs along what is summed: of dims for queries and keys, of tokens for probabilities and values.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.attention import Attention, Tile
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.flash import FlashWriter, arguments_of
from rewriter.runtimes.tvm.kernels.gemm_bf16 import DOT, LANES, SOURCE

PAIR = 2 * LANES
ROUND_PAIR = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"


def serves(attention: Attention) -> bool:
    """Whether this kernel can compute it: whole vectors of pairs along the dims."""
    return attention.lanes == LANES and attention.key.dim % PAIR == 0 and attention.value.dim % LANES == 0


def make_flash_bf16(attention: Attention, tile: Tile, name: str = "flash_bf16") -> Any:
    """PrimFunc (Q, K, V, bias?, O), as `make_flash`."""
    assert serves(attention) and tile.vectors % 2 == 0
    return emit.prim_func(name, arguments_of(attention), 1, _Writer(attention, tile).body)


def _words(low: Expression, high: Expression) -> Expression:
    """32 numbers side by side as 16 words. TVM knows no vectors of bfloat16 and is told of 16-bit integers."""
    return T.reinterpret("int32x16", T.call_llvm_intrin("uint16x32", ROUND_PAIR, high, low))


def _zipped(first: Expression, second: Expression) -> Expression:
    """Words whose low halves are `first` and whose high halves are `second`."""
    pairs = [lane // 2 + (lane % 2) * LANES for lane in range(PAIR)]
    both = T.reinterpret("int16x32", _words(first, second))
    return T.reinterpret("int32x16", T.Shuffle([both], pairs))


class _Writer(FlashWriter):
    def body(self, *buffers: Buffer) -> None:
        """See `FlashWriter.body`; with the instruction imported."""
        with T.attr(0, "pragma_import_llvm", SOURCE):
            super().body(*buffers)

    def _make_operands(self) -> None:
        dims = self.a.key.dim // 2
        self.Kt = scratch((self.padded // self.width, dims, self.width), "int32")
        self.Vp = scratch((-(-self.a.T // 2), self.out_vectors * LANES), "int32")
        self.Pw = scratch((self.tile.queries, self.keys // 2), "int32")
        self.Qw = scratch((self.tile.queries, dims), "int32")

    def _pack_keys(self) -> None:
        """K of this head, scaled and rounded, pairs of dims transposed; beyond T the last key is repeated."""
        square = scratch((LANES, LANES), "int32", registers=True)
        full, left = emit.split(self.padded, LANES)
        assert not left
        with loop(full) as strip, loop(self.a.key.dim // PAIR) as part:
            for row in range(LANES):
                token = T.min(strip * LANES + row, self.a.T - 1)
                at = self._at(self.a.key, self.a.key_head_of, token) + part * PAIR
                halves = (self.K[vec(at + half * LANES, LANES)] * splat(self.a.scale, LANES) for half in range(2))
                store(square, _words(*halves), row, vec(0, LANES))
            vectors.transpose(square, LANES)
            for row in range(LANES):
                store(self.Kt, square[row, vec(0, LANES)], *self._key_slot(strip * LANES, part * LANES + row, LANES))

    def _pack_values(self) -> None:
        """V of this head in pairs of tokens; the partner of a last odd token is zero."""
        full, left = emit.split(self.a.T, 2)
        if full:
            with loop(full) as pair:
                self._pack_pair(pair, odd=False)
        if left:
            self._pack_pair(T.int32(full), odd=True)

    def _pack_pair(self, pair: Index, odd: bool) -> None:
        first, second = (self._at(self.a.value, self.a.value_head_of, pair * 2 + i) for i in range(2))
        for part in range(self.a.value.dim // LANES):
            other = emit.zero_for(LANES) if odd else self.V[vec(second + part * LANES, LANES)]
            store(self.Vp, _zipped(self.V[vec(first + part * LANES, LANES)], other), pair, vec(part * LANES, LANES))

    def _queries(self, first: Index, count: int) -> None:
        with loop(count) as row, loop(self.a.query.dim // PAIR) as part:
            at = self._at(self.a.query, self.a.query_head_of, first + row) + part * PAIR
            words = _words(self.Q[vec(at, LANES)], self.Q[vec(at + LANES, LANES)])
            store(self.Qw, words, row, vec(part * LANES, LANES))
        super()._queries(first, count)

    def _score_sums(self, first: Index, row: Index, rows: int, key: Index, panel: Index) -> None:
        used = self.tile.vectors
        with loop(self.a.key.dim // 2) as pair:
            for i in range(rows):
                for n in range(used):
                    keys = self.Kt[T.floordiv(key, self.width) + panel, pair, vec(n * LANES, LANES)]
                    self._add(i * used + n, self.Qw[row + i, pair], keys)

    def _softmax(self, row: Index, keys: int) -> None:
        super()._softmax(row, keys)
        with loop(-(-keys // PAIR)) as part:
            halves = (self.P[row, vec(part * PAIR + half * LANES, LANES)] for half in range(2))
            store(self.Pw, _words(*halves), row, vec(part * LANES, LANES))

    def _value_sums(self, row: Index, rows: int, start: int, used: int, key: Index, keys: int) -> None:
        with loop(-(-keys // 2)) as pair:
            for i in range(rows):
                for n in range(used):
                    right = self.Vp[T.floordiv(key, 2) + pair, vec((start + n) * LANES, LANES)]
                    self._add(i * used + n, self.Pw[row + i, pair], right)

    def _add(self, slot: int, left: Expression, right: Expression) -> None:
        total = self.acc[slot, vec(0, LANES)]
        store(self.acc, T.call_extern("float32x16", DOT, total, splat(left, LANES), right), slot, vec(0, LANES))
