"""Fused attention: softmax(cap(scale Q K^T) + bias) V without ever storing all scores.

Scores of a few queries against a block of keys stay in L1; with more than one block of keys, running maximum and sum
rescale what was accumulated (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018;
T. Dao et al., "FlashAttention", 2022). Operands are read where projections left them, through strides; keys and values
are packed once for all query heads that share them. Panels of keys that the mask hides are left out (`skipping`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, packing, skipping, vectors
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand, Tile, pick, splits_of
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, Rows, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import exp_below_one, tanh

LOWEST = float(np.finfo(np.float32).min)
Argument = tuple[str, tuple[int, ...], str]


def make_flash(attention: Attention, tile: Tile, name: str = "flash") -> Any:
    """PrimFunc (Q, K, V, bias?, kept?, sink?, O (B, S, H * Dv)); one packed buffer may be given for Q, K and V."""
    return emit.prim_func(name, arguments_of(attention), 1, FlashWriter(attention, tile).body)


def arguments_of(attention: Attention) -> list[Argument]:
    """(name, shape, dtype) of what an attention kernel takes."""
    operands = (("q", attention.query), ("k", attention.key), ("v", attention.value))
    arguments = [(name, operand.shape, str(operand.dtype)) for name, operand in operands]
    for name, bias in (("bias", attention.bias), ("kept", attention.kept)):
        if bias is not None:
            arguments.append((name, bias.shape, bias.dtype))
    if attention.sink:
        arguments.append(("sink", (attention.heads,), "float32"))
    return [*arguments, ("o", (attention.B, attention.S, attention.heads * attention.value.dim), "float32")]


class FlashWriter:
    """Emits the statements of one attention. Subclasses hold and multiply operands in other number formats."""

    lists: Buffer  # of panels that groups of queries see, where some may be hidden

    def __init__(self, attention: Attention, tile: Tile) -> None:
        self.a, self.tile, self.lanes = attention, tile, attention.lanes
        self.width = self.lanes * tile.vectors
        self.panels = -(-attention.T // self.width)
        self.per_block = min(max(1, tile.keys // self.width), self.panels)
        self.keys = self.per_block * self.width
        self.parts = -(-attention.S // tile.queries)
        self.out_vectors = -(-attention.value.dim // self.lanes)
        self.skips = skipping.can_skip(self)
        # Maximum, sum and result are carried from block to block; else the only block writes them.
        self.running = self.per_block < self.panels or self.skips or attention.sink

    def take_buffers(self, *buffers: Buffer) -> None:
        """The arguments, flat."""
        a, rest = self.a, list(buffers)
        self.Q, self.K, self.V = (_flat(rest.pop(0), o.shape, o.dtype) for o in (a.query, a.key, a.value))
        self.M, self.kept = (None if b is None else _flat(rest.pop(0), b.shape, b.dtype) for b in (a.bias, a.kept))
        self.sink: Buffer = rest.pop(0) if a.sink else None
        self.O = _flat(rest.pop(0), (a.B, a.S, a.heads * a.value.dim))

    def body(self, *buffers: Buffer) -> None:
        """Items of work are groups of heads that share keys and values, in as many splits as threads need."""
        a = self.a
        self.take_buffers(*buffers)
        if self.skips:
            skipping.list_panels(self)
        repeats, units = a.repeats, a.repeats * self.parts
        groups, splits = a.heads // repeats, splits_of(a, units)
        with loop(a.B * groups * splits, parallel=a.threads > 1) as item, T.sblock("group"):
            self.batch = T.int32(0) if a.B == 1 else T.bind(T.floordiv(item, groups * splits))
            group = T.bind(T.floordiv(item, splits) % groups)
            self.head: Index = group * repeats
            self._make_scratch()
            self.pack()
            split = item % splits
            with loop(T.floordiv(units - 1 - split, splits) + 1 if splits > 1 else units) as turn:
                unit = T.bind(turn * splits + split)
                self.head = T.bind(group * repeats + T.floordiv(unit, self.parts))
                self._queries(T.bind(unit % self.parts))

    def origin(self, operand: Operand, table: tuple[int, ...]) -> Index:
        """Where the tokens of this batch and head begin."""
        return T.bind(self.batch * operand.batch + pick(table, self.head) * operand.head + operand.offset)

    def _make_scratch(self) -> None:
        tile, lanes = self.tile, self.lanes
        self.make_operands()
        # Rows are not a power of two apart: they would share a few sets of the cache.
        self.P = scratch((tile.queries, self.keys + lanes))
        self.top = scratch((tile.queries, lanes))
        self.total = scratch((tile.queries, lanes))
        self.partial = scratch((tile.queries, self.out_vectors * lanes))
        most = max(tile.vectors, min(self.out_vectors, 4))
        self.acc = scratch((tile.rows * most, lanes), registers=True)
        self.work = scratch((max(4, tile.vectors), lanes), registers=True)
        self.tail = scratch((lanes,), registers=True)

    # ---- operands: what other number formats replace

    def make_operands(self) -> None:
        """Packed keys, values and queries."""
        self.Kt = scratch((self.panels, self.a.key.dim, self.width))
        self.Vp = scratch((self.panels * self.width, self.out_vectors * self.lanes))
        self.Qp = scratch((self.tile.queries, self.a.query.dim))

    def pack(self) -> None:
        """Keys and values of this group."""
        packing.pack_keys(self)
        packing.pack_values(self)

    def take_queries(self, first: Index, count: Index) -> None:
        """Queries side by side, whatever their strides."""
        origin = self.origin(self.a.query, self.a.query_head_of)
        with loop(count) as row:
            packing.copy_row(self, self.Q, origin + (first + row) * self.a.query.token, self.Qp, row, self.a.query.dim)

    def score_sums(self, row: Index, rows: int, panel: Index) -> None:
        """acc = Q[row : row + rows] times a panel of keys."""
        lanes, used = self.lanes, self.tile.vectors
        self.clear(rows * used)
        with loop(self.a.key.dim) as dim:
            for i in range(rows):
                for n in range(used):
                    where = (i * used + n, vec(0, lanes))
                    product = splat(self.Qp[row + i, dim], lanes) * self.Kt[panel, dim, vec(n * lanes, lanes)]
                    store(self.acc, self.acc[where] + product, *where)

    def clear(self, count: int) -> None:
        """The first `count` sums begin at zero."""
        for slot in range(count):
            store(self.acc, emit.zero_for(self.lanes), slot, vec(0, self.lanes))

    def exponentials(self, row: Index, panels: Index) -> None:
        """P[row] = exp(P[row] - work[1]); work[2] = their sum, still by lanes."""
        lanes, every = self.lanes, vec(0, self.lanes)
        with loop(panels * self.tile.vectors) as part:
            at = vec(part * lanes, lanes)
            store(self.P, exp_below_one(self.P[row, at] - self.work[1, every], lanes), row, at)
            store(self.work, self.work[2, every] + self.P[row, at], 2, every)

    def value_sums(self, row: Index, rows: int, start: int, used: int, panel: Index, place: Index) -> None:
        """acc += the exponentials at `place` times the values of a panel of keys."""
        lanes = self.lanes
        with loop(self.width) as token:
            for i in range(rows):
                for n in range(used):
                    where = (i * used + n, vec(0, lanes))
                    right = self.Vp[panel * self.width + token, vec((start + n) * lanes, lanes)]
                    weight = splat(self.P[row + i, place * self.width + token], lanes)
                    store(self.acc, self.acc[where] + weight * right, *where)

    # ---- a group of queries

    def _queries(self, part: Index) -> None:
        queries, lanes = self.tile.queries, self.lanes
        first = T.bind(part * queries)
        count: Index = min(queries, self.a.S)
        if self.parts > 1 and self.a.S % queries:
            count = T.bind(T.min(T.int32(queries), self.a.S - first))
        self.take_queries(first, count)
        if self.running:
            self._begin(0, count)
        self.listed = skipping.Listed(self, part) if self.skips else None
        panels = self.panels if self.listed is None else self.listed.count
        blocks, left = emit.split(self.panels, self.per_block)
        if self.listed is None and not left:
            with loop(blocks) as block:
                self._block(first, count, block * self.per_block, self.per_block)
        else:
            with loop(T.floordiv(panels + (self.per_block - 1), self.per_block)) as block:
                begin = T.bind(block * self.per_block)
                self._block(first, count, begin, T.bind(T.min(T.int32(self.per_block), panels - begin)))
        with loop(count) as row:
            self._write(first + row, row, lanes)

    def _begin(self, first: Index, count: Index, sink_here: Expression | None = None) -> None:
        """Rows that have seen no key yet: the sink alone, where there is one (and it is here)."""
        lanes, every = self.lanes, vec(0, self.lanes)
        top, total = splat(-T.infinity("float32"), lanes), emit.zero_for(lanes)
        if self.a.sink:
            sink = self.sink[self.head]
            top = splat(sink if sink_here is None else T.Select(sink_here, sink, -T.infinity("float32")), lanes)
            # The sum is kept by lanes until the end, so what belongs to no lane stands in the first.
            some = T.And(vectors.first_lanes(1, lanes), top > splat(-T.infinity("float32"), lanes))
            total = T.Select(some, splat(1.0, lanes), total)
        with loop(count) as row:
            store(self.top, top, first + row, every)
            store(self.total, total, first + row, every)
            for part in range(self.out_vectors):
                store(self.partial, emit.zero_for(lanes), first + row, vec(part * lanes, lanes))

    def _panel(self, place: Index) -> Index:
        return place if self.listed is None else self.listed.panel(place)

    def _block(self, first: Index, count: Index, begin: Index, panels: Index) -> None:
        """Panels `begin` and following, of those seen."""
        for start, rows in self._row_tiles(count):
            with start as row, loop(panels) as place:
                self._score_tile(first, row, rows, T.bind(self._panel(begin + place)), place)
        with loop(count) as row:
            self._softmax(row, panels)
        for start, rows in self._row_tiles(count):
            with start as row:
                self._values(row, rows, begin, panels)

    def _row_tiles(self, count: Index) -> list[tuple[Any, int]]:
        """Full tiles of rows, and the rest that only the last group of queries has."""
        rows, left = self.tile.rows, self.a.S % self.tile.rows
        if isinstance(count, int):
            full, left = emit.split(count, rows)
            found = [(Rows(full, rows), rows)] if full else []
            return [*found, (Rows(1, 0, full * rows), left)] if left else found
        found = [(Rows(T.floordiv(count, rows), rows), rows)]
        if left:
            found.append((Rows(T.Select(count % rows > 0, 1, 0), 0, count - left), left))
        return found

    def _score_tile(self, first: Index, row: Index, rows: int, panel: Index, place: Index) -> None:
        """P[row : row + rows] = cap(Q K^T) + bias for a panel of keys."""
        self.score_sums(row, rows, panel)
        whole, left = emit.split(self.a.T, self.width)
        if not left:
            self._store_scores(first, row, rows, panel, place, self.width)
            return
        with T.If(panel < whole):
            with T.Then():
                self._store_scores(first, row, rows, panel, place, self.width)
            with T.Else():
                self._store_scores(first, row, rows, panel, place, left)

    def _store_scores(self, first: Index, row: Index, rows: int, panel: Index, place: Index, live: int) -> None:
        lanes, used = self.lanes, self.tile.vectors
        for i in range(rows):
            for n in range(used):
                inside = max(0, min(lanes, live - n * lanes))
                key = panel * self.width + n * lanes
                value = self._biased(self.acc[i * used + n, vec(0, lanes)], first + row + i, key, inside)
                store(self.P, value, row + i, vec(place * self.width + n * lanes, lanes))

    def _biased(self, score: Expression, query: Index, key: Index, inside: int) -> Expression:
        lanes, low, a = self.lanes, splat(-T.infinity("float32"), self.lanes), self.a
        if inside == 0:
            return low
        if a.softcap:
            score = splat(a.softcap, lanes) * tanh(score * splat(1.0 / a.softcap, lanes), lanes)
        if a.kept is not None:
            kept = self.mask_vector(a.kept, self.kept, query, key, inside)
            score = T.Select(kept, score, emit.zero_for(lanes))
        if a.bias is not None:
            bias = self.mask_vector(a.bias, self.M, query, key, inside)
            score = score + bias if a.bias.kind == "add" else T.Select(bias, score, low)
        if inside < lanes:
            score = T.Select(vectors.first_lanes(inside, lanes), score, low)
        return score

    def mask_vector(self, bias: Bias, buffer: Buffer, query: Index, key: Index, inside: int) -> Expression:
        """The mask of one query and a vector of keys, of which the first `inside` exist."""
        b, h, s, t = bias.shape
        at = (self.batch * (h * s * t) if b > 1 else 0) + (self.head * (s * t) if h > 1 else 0)
        return vectors.load_mask(buffer, bias, at + (query * t if s > 1 else 0), key, inside, self.lanes, self.tail)

    def _softmax(self, row: Index, panels: Index) -> None:
        """P[row] = exp(P[row] - maximum); updates maximum and sum, and rescales what was accumulated so far."""
        lanes, used, work, every = self.lanes, self.tile.vectors, self.work, vec(0, self.lanes)
        for n in range(used):  # a maximum for each vector of a panel: one alone waits for itself
            store(work, self.top[row, every] if self.running else splat(-T.infinity("float32"), lanes), n, every)
        with loop(panels) as panel:
            for n in range(used):
                value = self.P[row, vec(panel * self.width + n * lanes, lanes)]
                store(work, T.max(work[n, every], value), n, every)
        for n in range(1, used):
            store(work, T.max(work[0, every], work[n, every]), 0, every)
        vectors.reduce_lanes(work, 0, vectors.maximum, lanes)
        store(work, T.max(work[0, every], splat(LOWEST, lanes)), 1, every)
        store(work, emit.zero_for(lanes), 2, every)
        self.exponentials(row, panels)
        if self.running:
            # The sum of a row whose maximum was infinite is NaN, and so is the row.
            store(work, exp_below_one(self.top[row, every] - work[1, every], lanes), 3, every)
            store(work, work[2, every] + self.total[row, every] * work[3, every], 2, every)
            for part in range(self.out_vectors):
                at = vec(part * lanes, lanes)
                store(self.partial, self.partial[row, at] * work[3, every], row, at)
        store(self.total, work[2, every], row, every)
        store(self.top, work[0, every], row, every)

    def _values(self, row: Index, rows: int, begin: Index, panels: Index) -> None:
        """partial[row : row + rows] (+)= P V, a few vectors of V at a time."""
        lanes = self.lanes
        for start, used in emit.tiles(self.out_vectors, max(self.tile.vectors, min(self.out_vectors, 4))):
            per_pass = max(1, (self.tile.rows * self.tile.vectors) // used)
            for offset, part in emit.tiles(rows, per_pass):
                slots = [(i, n, vec((start + n) * lanes, lanes)) for i in range(part) for n in range(used)]
                for i, n, at in slots:
                    known = self.partial[row + offset + i, at] if self.running else emit.zero_for(lanes)
                    store(self.acc, known, i * used + n, vec(0, lanes))
                with loop(panels) as place:
                    self.value_sums(row + offset, part, start, used, T.bind(self._panel(begin + place)), place)
                for i, n, at in slots:
                    store(self.partial, self.acc[i * used + n, vec(0, lanes)], row + offset + i, at)

    def _write(self, query: Index, row: Index, lanes: int) -> None:
        """O = partial / sum; a row whose scores were all -inf follows `empty_rows`."""
        every, (full, left) = vec(0, lanes), emit.split(self.a.value.dim, lanes)
        store(self.work, self.total[row, every], 2, every)
        vectors.reduce_lanes(self.work, 2, vectors.add, lanes)
        empty = T.float32(0) if self.a.empty_rows == "zero" else T.float32(float("nan"))
        nothing = self.top[row, every] < splat(LOWEST, lanes)
        store(
            self.work, T.Select(nothing, T.Broadcast(empty, lanes), splat(1.0, lanes) / self.work[2, every]), 0, every
        )
        width = self.a.heads * self.a.value.dim
        at = (self.batch * self.a.S + query) * width + self.head * self.a.value.dim
        for part in range(full):
            value = self.partial[row, vec(part * lanes, lanes)] * self.work[0, every]
            store(self.O, value, vec(at + part * lanes, lanes))
        if left:
            store(self.tail, self.partial[row, vec(full * lanes, lanes)] * self.work[0, every], every)
            for lane in range(left):
                store(self.O, self.tail[lane], at + full * lanes + lane)


def _flat(buffer: Buffer, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
    return emit.flat(buffer, (prod(shape),), dtype)
