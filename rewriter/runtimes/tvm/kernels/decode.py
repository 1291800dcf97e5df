"""Attention of few queries over many keys, as in decoding with a cache: keys and values are streamed once, not packed.

All query heads that share keys and values are rows of one computation, so that the cache is read once for them. Scores
of a few keys are sums along the dims, each in a vector of its own, that a tree of exchanges turns into one vector with
a score per lane. Where there are fewer groups of heads than threads, long caches are split and the parts put together
by their maxima and sums (T. Dao et al., "Flash-Decoding", 2023). A cache may hold bfloat16; it is widened when read.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels import emit, skipping, vectors
from rewriter.runtimes.tvm.kernels.attention import Attention, Operand, Tile
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, Rows, loop, scratch, splat, store, vec
from rewriter.runtimes.tvm.kernels.expressions import exp_below_one
from rewriter.runtimes.tvm.kernels.flash import LOWEST, FlashWriter, arguments_of

MOST_ROWS = 16  # queries times heads of a group, beyond which packing keys pays
LEAST_KEYS = 256  # of one split of a cache


def serves(attention: Attention) -> bool:
    """Whether this kernel can compute it and should: few rows, dims of whole vectors."""
    return rows_of(attention) <= MOST_ROWS and can_compute(attention)


def can_compute(attention: Attention) -> bool:
    """Dims of whole vectors, in pairs of vectors where a cache holds bfloat16."""
    return all(op.dim % step(op, attention.lanes) == 0 for op in (attention.key, attention.value))


def step(operand: Operand, lanes: int) -> int:
    """How many numbers of keys or values are read at once."""
    return lanes * _pack(operand)


def rows_of(attention: Attention) -> int:
    """Queries times heads of one group."""
    return attention.S * attention.repeats


def default_tile(attention: Attention, target: Target) -> Tile:
    """As many sums as registers hold beside operands, and blocks of keys whose values stay in L2."""
    return Tile(12 if target.registers >= 32 else 6, 2, rows_of(attention), 256)


def make_decode(attention: Attention, tile: Tile, name: str = "decode") -> Any:
    """PrimFunc (Q, K, V, bias?, kept?, sink?, O), as `make_flash`; of `tile`, `keys` and `vectors` count."""
    assert can_compute(attention)
    return emit.prim_func(name, arguments_of(attention), 1, _Writer(attention, tile).body)


def _pack(operand: Operand) -> int:
    """Numbers in 32 bits."""
    return 1 if operand.dtype == "float32" else 2


class _Writer(FlashWriter):
    def __init__(self, attention: Attention, tile: Tile) -> None:
        self.R = rows_of(attention)
        super().__init__(attention, Tile(tile.rows, tile.vectors, max(self.R, attention.S), tile.keys))
        heads = 1 if attention.bias is None else attention.bias.shape[1]
        self.skips = self.skips and (heads == 1 or attention.repeats == 1)
        self.running = True
        groups = attention.B * attention.heads // attention.repeats
        most = max(1, min(attention.T // LEAST_KEYS, -(-self.panels // self.per_block)))
        self.splits = next((n for n in range(1, most + 1) if groups * n % attention.threads == 0), most)
        self.per_block = min(self.per_block, -(-self.panels // self.splits))
        self.keys = self.per_block * self.width

    def body(self, *buffers: Buffer) -> None:
        """Items of work are groups of heads that share keys and values, times splits of the keys."""
        a = self.a
        self.take_buffers(*buffers)
        if self.skips:
            skipping.list_panels(self)
        self.groups = a.heads // a.repeats
        self._make_state(a.B * self.groups * self.splits)
        parallel = a.threads > 1
        with loop(a.B * self.groups * self.splits, parallel) as item, T.sblock("group"):
            self._enter(T.floordiv(item, self.splits))
            self._registers()
            base = T.bind(item * self.R)
            self._stream(base, item % self.splits)
            if self.splits == 1:
                self._write_rows(base)
        if self.splits > 1:
            with loop(a.B * self.groups, parallel) as item, T.sblock("join"):
                self._enter(item)
                self._registers()
                self._join(T.bind(item * (self.splits * self.R)))

    def _make_state(self, items: int) -> None:
        """Of all items, as those of one group are put together at the end."""
        rows, lanes = items * self.R, self.lanes
        self.P = scratch((rows, self.keys + lanes))
        self.top, self.total = scratch((rows, lanes)), scratch((rows, lanes))
        self.partial = scratch((rows, self.out_vectors * lanes))

    def _enter(self, item: Index) -> None:
        self.batch = T.int32(0) if self.a.B == 1 else T.bind(T.floordiv(item, self.groups))
        self.first_head = T.bind(item % self.groups * self.a.repeats)
        self.head = self.first_head

    def _registers(self) -> None:
        lanes = self.lanes
        self.acc = scratch((max(lanes, self._slots()), lanes), registers=True)
        self.work = scratch((max(4, self.tile.vectors), lanes), registers=True)
        self.tail = scratch((lanes,), registers=True)
        self.Qp = scratch((self.R, self.a.key.dim))

    def _slots(self) -> int:
        return self.tile.rows * self.tile.vectors

    # ---- one item

    def _stream(self, base: Index, split: Index) -> None:
        a = self.a
        with loop(a.repeats) as j, loop(a.S) as s:
            self.head = T.bind(self.first_head + j)
            self._take_query(s, T.bind(j * a.S + s))
        for j in range(a.repeats) if a.sink else (0,):
            self.head = self.first_head + j
            self._begin(base + j * a.S, a.S if a.sink else self.R, split == 0 if self.splits > 1 else None)
        self.head = self.first_head
        self.key_origin = self.origin(a.key, a.key_head_of)
        self.value_origin = self.origin(a.value, a.value_head_of)
        self.listed = skipping.Listed(self, T.int32(0)) if self.skips else None
        panels: Index = T.int32(self.panels) if self.listed is None else self.listed.count
        blocks = T.bind(T.floordiv(panels + (self.per_block - 1), self.per_block))
        with loop(T.floordiv(blocks + (self.splits - 1) - split, self.splits)) as turn:
            begin = T.bind((turn * self.splits + split) * self.per_block)
            self._step(base, begin, T.bind(T.min(T.int32(self.per_block), panels - begin)))

    def _step(self, base: Index, begin: Index, panels: Index) -> None:
        """Panels `begin` and following, of those seen."""
        a = self.a
        with loop(panels) as place:
            panel = T.bind(self._panel(begin + place))
            with loop(a.repeats) as j, loop(a.S) as s:
                self.head = T.bind(self.first_head + j)
                self._scores(base, T.bind(j * a.S + s), s, panel, place)
        with loop(self.R) as row:
            self._softmax(T.bind(base + row), panels)
        self._sums(base, begin, panels)

    def _take_query(self, query: Index, row: Index) -> None:
        """Scaled; for keys in pairs, even dims of a pair of vectors before odd ones."""
        a, lanes = self.a, self.lanes
        at = T.bind(self.origin(a.query, a.query_head_of) + query * a.query.token)
        if _pack(a.key) == 1:
            with loop(a.key.dim // lanes) as part:
                store(
                    self.Qp,
                    self.Q[vec(at + part * lanes, lanes)] * splat(a.scale, lanes),
                    row,
                    vec(part * lanes, lanes),
                )
            return
        with loop(a.key.dim // (2 * lanes)) as part, loop(lanes) as lane, loop(2) as odd:
            value = self.Q[at + part * (2 * lanes) + lane * 2 + odd] * T.float32(a.scale)
            store(self.Qp, value, row, part * (2 * lanes) + odd * lanes + lane)

    def _scores(self, base: Index, row: Index, query: Index, panel: Index, place: Index) -> None:
        """P[base + row] = the scores of one query and a panel of keys."""
        whole, left = emit.split(self.a.T, self.width)
        if not left:
            self._score_panel(base, row, query, panel, place, self.width)
            return
        with T.If(panel < whole):
            with T.Then():
                self._score_panel(base, row, query, panel, place, self.width)
            with T.Else():
                self._score_panel(base, row, query, panel, place, left)

    def _score_panel(self, base: Index, row: Index, query: Index, panel: Index, place: Index, live: int) -> None:
        lanes = self.lanes
        for start in range(0, self.width, lanes):
            inside = max(0, min(lanes, live - start))
            key = panel * self.width + start
            if inside:
                self._dot_products(row, key, inside)
            value = self._biased(self.acc[0, vec(0, lanes)], query, key, inside)
            store(self.P, value, base + row, vec(place * self.width + start, lanes))

    def _dot_products(self, row: Index, key: Index, inside: int) -> None:
        """acc[0] = the products of one query with a vector of keys, of which the first `inside` exist."""
        a, lanes, every = self.a, self.lanes, vec(0, self.lanes)
        for i in range(lanes):
            store(self.acc, emit.zero_for(lanes), i, every)
        width = step(a.key, lanes)
        with loop(a.key.dim // width) as part:
            for i in range(inside):
                at = self.key_origin + (key + i) * a.key.token + part * width
                for n, numbers in enumerate(_widened(self.K, at, a.key, lanes)):
                    query = self.Qp[row, vec(part * width + n * lanes, lanes)]
                    store(self.acc, self.acc[i, every] + query * numbers, i, every)
        vectors.sums_of_rows(self.acc, lanes)

    def _sums(self, base: Index, begin: Index, panels: Index) -> None:
        """partial += P V, a few rows and vectors of V at a time."""
        for start, used in emit.tiles(self.out_vectors, 4):
            used_pairs = used + used % _pack(self.a.value)
            most = max(1, self._slots() // used_pairs)
            rows = -(-self.R // -(-self.R // most))
            full, left = emit.split(self.R, rows)
            for tile, count in ((Rows(full, rows), rows), (Rows(1, 0, full * rows), left)):
                if count and (full or count == left):
                    with tile as row:
                        self._sum_tile(T.bind(base + row), count, start, used, begin, panels)

    def _sum_tile(self, row: Index, rows: int, start: int, used: int, begin: Index, panels: Index) -> None:
        a, lanes, pack = self.a, self.lanes, _pack(self.a.value)
        slots = [(i, n, vec((start + n) * lanes, lanes)) for i in range(rows) for n in range(used)]
        for i, n, at in slots:
            store(self.acc, self.partial[row + i, at], i * used + n, vec(0, lanes))
        with loop(panels) as place:
            panel = T.bind(self._panel(begin + place))
            live: Index = self.width
            if a.T % self.width:
                live = T.bind(T.min(T.int32(self.width), a.T - panel * self.width))
            with loop(live) as token:
                at = T.bind(self.value_origin + (panel * self.width + token) * a.value.token + start * lanes)
                for n in range(0, used, pack):
                    for half, numbers in enumerate(_widened(self.V, at + n * lanes, a.value, lanes)):
                        right = T.bind(numbers)
                        for i in range(rows):
                            where = (i * used + n + half, vec(0, lanes))
                            weight = splat(self.P[row + i, place * self.width + token], lanes)
                            store(self.acc, self.acc[where] + weight * right, *where)
        for i, n, at in slots:
            store(self.partial, self.acc[i * used + n, vec(0, lanes)], row + i, at)

    # ---- the end

    def _join(self, base: Index) -> None:
        """The rows of all splits become those of the first."""
        lanes, work, every = self.lanes, self.work, vec(0, self.lanes)
        with loop(self.R) as r:
            row = T.bind(base + r)
            store(work, self.top[row, every], 0, every)
            with loop(self.splits - 1) as part:
                store(work, T.max(work[0, every], self.top[row + (part + 1) * self.R, every]), 0, every)
            store(work, T.max(work[0, every], splat(LOWEST, lanes)), 1, every)
            with loop(self.splits) as part:
                other = T.bind(row + part * self.R)
                factor = T.bind(exp_below_one(self.top[other, every] - work[1, every], lanes))
                store(self.total, self.total[other, every] * factor, other, every)
                for n in range(self.out_vectors):
                    at = vec(n * lanes, lanes)
                    store(self.partial, self.partial[other, at] * factor, other, at)
            with loop(self.splits - 1) as part:
                other = T.bind(row + (part + 1) * self.R)
                store(self.total, self.total[row, every] + self.total[other, every], row, every)
                for n in range(self.out_vectors):
                    at = vec(n * lanes, lanes)
                    store(self.partial, self.partial[row, at] + self.partial[other, at], row, at)
            store(self.top, work[0, every], row, every)
        self._write_rows(base)

    def _write_rows(self, base: Index) -> None:
        a, lanes = self.a, self.lanes
        with loop(a.repeats) as j, loop(a.S) as s:
            self.head = T.bind(self.first_head + j)
            row = T.bind(base + j * a.S + s)
            if _pack(a.value) == 2:
                with loop(self.out_vectors // 2) as pair:
                    self._interleave(row, pair * (2 * lanes))
            self._write(s, row, lanes)

    def _interleave(self, row: Index, start: Index) -> None:
        """Even dims before odd ones become dims in order."""
        lanes = self.lanes
        halves = [self.partial[row, vec(start + half * lanes, lanes)] for half in range(2)]
        for half in range(2):
            order = [(half * lanes + lane) // 2 + (lane % 2) * lanes for lane in range(lanes)]
            store(self.tail if half else self.work, T.Shuffle(halves, order), *(() if half else (0,)), vec(0, lanes))
        store(self.partial, self.work[0, vec(0, lanes)], row, vec(start, lanes))
        store(self.partial, self.tail[vec(0, lanes)], row, vec(start + lanes, lanes))


def _widened(buffer: Buffer, at: Index, operand: Operand, lanes: int) -> list[Expression]:
    """A vector of float32; of bfloat16, the even and the odd numbers of two vectors."""
    if _pack(operand) == 1:
        return [buffer[vec(at, lanes)]]
    kind, suffix = f"int32x{lanes}", f"float32x{lanes}"
    pairs = T.bind(T.reinterpret(kind, buffer[vec(at, 2 * lanes)]))
    even = T.shift_left(pairs, T.Broadcast(T.int32(16), lanes))
    odd = pairs & T.Broadcast(T.int32(-65536), lanes)
    return [T.reinterpret(suffix, even), T.reinterpret(suffix, odd)]
