"""Fused attention: softmax(cap(scale Q K^T) + bias) V without ever storing all scores.

Scores of a few queries against a block of keys stay in L1; with more than one block of keys, running maximum and sum
rescale what was accumulated (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018;
T. Dao et al., "FlashAttention", 2022). Operands are read where projections left them, through strides.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, skipping, vectors
from rewriter.runtimes.tvm.kernels.attention import Attention, Operand, Tile, pick
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import exp, tanh

LOWEST = float(np.finfo(np.float32).min)


def make_flash(attention: Attention, tile: Tile, name: str = "flash") -> Any:
    """PrimFunc (Q, K, V, bias?, O (B, S, H * Dv)); the same packed buffer may be given for Q, K and V."""
    return emit.prim_func(name, arguments_of(attention), 1, FlashWriter(attention, tile).body)


def arguments_of(attention: Attention) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of what an attention kernel takes."""
    operands = (("q", attention.query), ("k", attention.key), ("v", attention.value))
    arguments = [(name, operand.shape, "float32") for name, operand in operands]
    if attention.bias is not None:
        arguments.append(("bias", attention.bias.shape, attention.bias.dtype))
    width = attention.heads * attention.value.dim
    arguments.append(("o", (attention.B, attention.S, width), "float32"))
    return arguments


def _flat(buffer: Buffer, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
    return emit.flat(buffer, (prod(shape),), dtype)


class FlashWriter:
    """Emits the statements of one attention. Subclasses hold and multiply operands in other number formats."""

    def __init__(self, attention: Attention, tile: Tile) -> None:
        self.a, self.tile, self.lanes = attention, tile, attention.lanes
        self.width = self.lanes * tile.vectors
        self.keys = min(-(-tile.keys // self.width) * self.width, -(-attention.T // self.width) * self.width)
        self.blocks = -(-attention.T // self.keys)
        self.padded = -(-attention.T // self.width) * self.width
        self.out_vectors = -(-attention.value.dim // self.lanes)

    def body(self, *buffers: Buffer) -> None:
        """One head at a time."""
        a, rest = self.a, list(buffers)
        self.Q = _flat(rest.pop(0), a.query.shape)
        self.K = _flat(rest.pop(0), a.key.shape)
        self.V = _flat(rest.pop(0), a.value.shape)
        self.M: Buffer = None if a.bias is None else _flat(rest.pop(0), a.bias.shape, a.bias.dtype)
        self.O = _flat(rest.pop(0), (a.B, a.S, a.heads * a.value.dim))
        with loop(a.B * a.heads, parallel=a.threads > 1) as item, T.sblock("head"):
            self.batch, self.head = (T.int32(0), item) if a.B == 1 else (T.floordiv(item, a.heads), item % a.heads)
            self._head()

    def _at(self, operand: Operand, table: tuple[int, ...], token: Index) -> Index:
        head = pick(table, self.head)
        return self.batch * operand.batch + head * operand.head + (operand.offset + token * operand.token)

    def _head(self) -> None:
        tile, lanes = self.tile, self.lanes
        self._make_operands()
        self.P = scratch((tile.queries, self.keys))
        self.top = scratch((tile.queries, lanes))
        self.total = scratch((tile.queries, lanes))
        self.partial = scratch((tile.queries, self.out_vectors * lanes))
        most = max(tile.vectors, min(self.out_vectors, 4))
        self.acc = scratch((tile.rows * most, lanes), registers=True)
        self.work = scratch((4, lanes), registers=True)
        self.tail = scratch((lanes,), registers=True)
        self.hidden = scratch((2, lanes), registers=True)
        self._pack_keys()
        self._pack_values()
        full, left = emit.split(self.a.S, tile.queries)
        if full:
            with loop(full) as part:
                self._queries(part * tile.queries, tile.queries)
        if left:
            self._queries(full * tile.queries, left)

    def _make_operands(self) -> None:
        self.Kt = scratch((self.padded // self.width, self.a.key.dim, self.width))
        self.Vp = scratch((self.a.T, self.out_vectors * self.lanes))

    # ---- packing

    def _pack_keys(self) -> None:
        """K of this head, scaled, transposed into panels; keys beyond T are zero."""
        lanes, square = self.lanes, scratch((self.lanes, self.lanes), registers=True)
        full, left = emit.split(self.a.T, lanes)
        dims, rest = emit.split(self.a.key.dim, lanes)
        if full and dims:
            with loop(full) as strip, loop(dims) as part:
                for row in range(lanes):
                    at = self._at(self.a.key, self.a.key_head_of, strip * lanes + row) + part * lanes
                    store(square, self.K[vec(at, lanes)] * splat(self.a.scale, lanes), row, vec(0, lanes))
                vectors.transpose(square, lanes)
                for row in range(lanes):
                    store(
                        self.Kt, square[row, vec(0, lanes)], *self._key_slot(strip * lanes, part * lanes + row, lanes)
                    )
        if full and rest:
            self._pack_scalars(0, full * lanes, dims * lanes, self.a.key.dim)
        if left:
            self._pack_scalars(full * lanes, self.a.T, 0, self.a.key.dim)
        if self.padded > self.a.T:
            with loop(self.padded - self.a.T) as token, loop(self.a.key.dim) as dim:
                store(self.Kt, T.float32(0), *self._key_slot(self.a.T + token, dim, 1))

    def _key_slot(self, token: Index, dim: Index, lanes: int) -> tuple[Index, Index, Index]:
        return T.floordiv(token, self.width), dim, vec(T.floormod(token, self.width), lanes)

    def _pack_scalars(self, token: int, token_end: int, dim: int, dim_end: int) -> None:
        with loop(token_end - token) as t, loop(dim_end - dim) as d:
            value = self.K[self._at(self.a.key, self.a.key_head_of, token + t) + (dim + d)]
            store(self.Kt, value * T.float32(self.a.scale), *self._key_slot(token + t, dim + d, 1))

    def _pack_values(self) -> None:
        """V of this head, contiguous, dims padded with zeros."""
        lanes, (full, left) = self.lanes, emit.split(self.a.value.dim, self.lanes)
        with loop(self.a.T) as token:
            at = self._at(self.a.value, self.a.value_head_of, token)
            for part in range(full):
                store(self.Vp, self.V[vec(at + part * lanes, lanes)], token, vec(part * lanes, lanes))
            if left:
                tail = vectors.load_part(
                    lambda lane: self.V[at + full * lanes + lane], left, self.tail, lanes, T.float32(0)
                )
                store(self.Vp, tail, token, vec(full * lanes, lanes))

    # ---- a group of queries

    def _queries(self, first: Index, count: int) -> None:
        lanes = self.lanes
        if self.blocks > 1:
            with loop(count) as i:
                store(self.top, splat(-T.infinity("float32"), lanes), i, vec(0, lanes))
                store(self.total, emit.zero_for(lanes), i, vec(0, lanes))
                for part in range(self.out_vectors):
                    store(self.partial, emit.zero_for(lanes), i, vec(part * lanes, lanes))
        full, left = emit.split(self.a.T, self.keys)
        if full:
            with loop(full) as block:
                self._seen_block(first, count, block * self.keys, self.keys)
        if left:
            self._seen_block(first, count, full * self.keys, left)
        self._write(first, count)

    def _seen_block(self, first: Index, count: int, key: Index, keys: int) -> None:
        if not skipping.can_skip(self):
            self._block(first, count, key, keys)
            return
        with T.If(skipping.is_seen(self, first, count, key, keys)), T.Then():
            self._block(first, count, key, keys)

    def _block(self, first: Index, count: int, key: Index, keys: int) -> None:
        for start, rows in self._row_tiles(count):
            with start as row:
                self._scores(first, row, rows, key, keys)
        with loop(count) as row:
            self._softmax(row, keys)
        for start, rows in self._row_tiles(count):
            with start as row:
                self._values(row, rows, key, keys)

    def _row_tiles(self, count: int) -> list[tuple[Any, int]]:
        full, left = emit.split(count, self.tile.rows)
        found: list[tuple[Any, int]] = []
        if full:
            found.append((_Scaled(full, self.tile.rows), self.tile.rows))
        if left:
            found.append((_Scaled(1, 0, full * self.tile.rows), left))
        return found

    def _scores(self, first: Index, row: Index, rows: int, key: Index, keys: int) -> None:
        """P[row : row + rows] = cap(Q K^T) + bias for a block of keys, panel by panel."""
        full, left = emit.split(keys, self.width)
        if full:
            with loop(full) as panel:
                self._score_tile(first, row, rows, key, panel, self.width)
        if left:
            self._score_tile(first, row, rows, key, T.int32(full), left)

    def _score_tile(self, first: Index, row: Index, rows: int, key: Index, panel: Index, live: int) -> None:
        lanes, used = self.lanes, self.tile.vectors
        for slot in range(rows * used):
            store(self.acc, emit.zero_for(lanes), slot, vec(0, lanes))
        self._score_sums(first, row, rows, key, panel)
        for i in range(rows):
            for n in range(used):
                inside = max(0, min(lanes, live - n * lanes))
                column = panel * self.width + n * lanes
                value = self._biased(self.acc[i * used + n, vec(0, lanes)], first + row + i, key + column, inside)
                store(self.P, value, row + i, vec(column, lanes))

    def _score_sums(self, first: Index, row: Index, rows: int, key: Index, panel: Index) -> None:
        lanes, used = self.lanes, self.tile.vectors
        at = [self._at(self.a.query, self.a.query_head_of, first + row + i) for i in range(rows)]
        with loop(self.a.key.dim) as dim:
            for i in range(rows):
                for n in range(used):
                    where = (i * used + n, vec(0, lanes))
                    keys = self.Kt[T.floordiv(key, self.width) + panel, dim, vec(n * lanes, lanes)]
                    store(self.acc, self.acc[where] + splat(self.Q[at[i] + dim], lanes) * keys, *where)

    def _biased(self, score: Expression, query: Index, key: Index, inside: int) -> Expression:
        lanes, low = self.lanes, splat(-T.infinity("float32"), self.lanes)
        if inside == 0:
            return low
        if self.a.softcap:
            score = splat(self.a.softcap, lanes) * tanh(score * splat(1.0 / self.a.softcap, lanes), lanes)
        if self.a.bias is not None:
            bias = self.bias_vector(query, key, inside)
            score = score + bias if self.a.bias.kind == "add" else T.Select(bias, score, low)
        if inside < lanes:
            score = T.Select(T.Ramp(T.int32(0), 1, lanes) < T.Broadcast(T.int32(inside), lanes), score, low)
        return score

    def bias_vector(self, query: Index, key: Index, inside: int) -> Expression:
        """The mask of one query and a vector of keys, of which the first `inside` exist."""
        assert self.a.bias is not None and self.M is not None
        b, h, s, t = self.a.bias.shape
        at = (self.batch * (h * s * t) if b > 1 else 0) + (self.head * (s * t) if h > 1 else 0)
        at = at + (query * t if s > 1 else 0)
        if t == 1:
            return T.Broadcast(self.M[at], self.lanes)
        if inside == self.lanes:
            return self.M[vec(at + key, self.lanes)]
        add = self.a.bias.kind == "add"
        tail = self.tail if add else scratch((self.lanes,), "bool")
        fill = T.float32(0) if add else T.bool(False)
        return vectors.load_part(lambda lane: self.M[at + key + lane], inside, tail, self.lanes, fill)

    def _softmax(self, row: Index, keys: int) -> None:
        """P[row] = exp(P[row] - maximum); updates maximum and sum, and rescales what was accumulated so far."""
        lanes, parts, work, all_lanes = self.lanes, -(-keys // self.lanes), self.work, vec(0, self.lanes)
        store(work, self.P[row, all_lanes], 0, all_lanes)
        with loop(parts - 1) as part:
            store(work, T.max(work[0, all_lanes], self.P[row, vec((part + 1) * lanes, lanes)]), 0, all_lanes)
        vectors.reduce_lanes(work, 0, vectors.maximum, lanes)
        if self.blocks > 1:
            store(work, T.max(work[0, all_lanes], self.top[row, all_lanes]), 0, all_lanes)
        finite = T.max(work[0, all_lanes], splat(LOWEST, lanes))
        store(work, finite, 1, all_lanes)
        store(work, emit.zero_for(lanes), 2, all_lanes)
        with loop(parts) as part:
            at = vec(part * lanes, lanes)
            store(self.P, exp(self.P[row, at] - work[1, all_lanes], lanes), row, at)
            store(work, work[2, all_lanes] + self.P[row, at], 2, all_lanes)
        vectors.reduce_lanes(work, 2, vectors.add, lanes)
        if self.blocks > 1:
            store(work, exp(self.top[row, all_lanes] - work[1, all_lanes], lanes), 3, all_lanes)
            store(work, work[2, all_lanes] + self.total[row, all_lanes] * work[3, all_lanes], 2, all_lanes)
            for part in range(self.out_vectors):
                at = vec(part * lanes, lanes)
                store(self.partial, self.partial[row, at] * work[3, all_lanes], row, at)
        store(self.total, work[2, all_lanes], row, all_lanes)
        store(self.top, work[0, all_lanes], row, all_lanes)

    def _values(self, row: Index, rows: int, key: Index, keys: int) -> None:
        """partial[row : row + rows] (+)= P V, a few vectors of V at a time."""
        lanes = self.lanes
        for start, used in emit.tiles(self.out_vectors, max(self.tile.vectors, min(self.out_vectors, 4))):
            per_pass = max(1, (self.tile.rows * self.tile.vectors) // used)
            for offset, part in emit.tiles(rows, per_pass):
                for i in range(part):
                    for n in range(used):
                        at = vec((start + n) * lanes, lanes)
                        begin = self.partial[row + offset + i, at] if self.blocks > 1 else emit.zero_for(lanes)
                        store(self.acc, begin, i * used + n, vec(0, lanes))
                self._value_sums(row + offset, part, start, used, key, keys)
                for i in range(part):
                    for n in range(used):
                        at = vec((start + n) * lanes, lanes)
                        store(self.partial, self.acc[i * used + n, vec(0, lanes)], row + offset + i, at)

    def _value_sums(self, row: Index, rows: int, start: int, used: int, key: Index, keys: int) -> None:
        lanes = self.lanes
        with loop(keys) as token:
            for i in range(rows):
                for n in range(used):
                    where = (i * used + n, vec(0, lanes))
                    right = self.Vp[key + token, vec((start + n) * lanes, lanes)]
                    weight = splat(self.P[row + i, token], lanes)
                    store(self.acc, self.acc[where] + weight * right, *where)

    def _write(self, first: Index, count: int) -> None:
        """O = partial / sum; a row whose scores were all -inf follows `empty_rows`."""
        lanes, all_lanes = self.lanes, vec(0, self.lanes)
        full, left = emit.split(self.a.value.dim, lanes)
        empty = T.float32(0) if self.a.empty_rows == "zero" else T.float32(float("nan"))
        with loop(count) as row:
            nothing = self.top[row, all_lanes] < splat(LOWEST, lanes)
            factor = T.Select(nothing, T.Broadcast(empty, lanes), splat(1.0, lanes) / self.total[row, all_lanes])
            store(self.work, factor, 0, all_lanes)
            width = self.a.heads * self.a.value.dim
            at = (self.batch * self.a.S + first + row) * width + self.head * self.a.value.dim
            for part in range(full):
                value = self.partial[row, vec(part * lanes, lanes)] * self.work[0, all_lanes]
                store(self.O, value, vec(at + part * lanes, lanes))
            if left:
                store(self.tail, self.partial[row, vec(full * lanes, lanes)] * self.work[0, all_lanes], all_lanes)
                for lane in range(left):
                    store(self.O, self.tail[lane], at + full * lanes + lane)


class _Scaled:
    """A loop whose variable counts in steps."""

    def __init__(self, count: int, step: int, start: int = 0) -> None:
        self.loop, self.step, self.start = loop(count), step, start

    def __enter__(self) -> Index:
        return self.loop.__enter__() * self.step + self.start

    def __exit__(self, *details: Any) -> None:
        self.loop.__exit__(*details)
