"""Panels of keys that a mask hides from a whole group of queries are not computed: causal masks, windows, padding.

Which panels are seen is read from the mask itself at run time, once for all heads that share it, so that masks that
depend on data are served too and a wrong claim about a mask cannot make a result wrong. A panel is left out where
every number of it is -inf (or False), or where all are beyond any score and every query of the group sees some key that
is not: its exponentials are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.attention import Bias
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, scratch, splat, store, vec

if TYPE_CHECKING:
    from rewriter.runtimes.tvm.kernels.flash import FlashWriter

BEYOND_SCORES, SEEN = -1e30, -1e29  # masks of -1e4 or -1e9 are ordinary numbers and are added


def can_skip(writer: FlashWriter) -> bool:
    """Several panels, and a mask that differs between keys."""
    bias = writer.a.bias
    return writer.panels > 1 and bias is not None and bias.shape[3] > 1


class Listed:
    """The panels that one group of queries sees, as the kernel reads them."""

    def __init__(self, writer: FlashWriter, part: Index) -> None:
        assert writer.a.bias is not None
        b, h, s, _ = writer.a.bias.shape
        index = writer.batch if b > 1 else 0
        index = index * h + (writer.head if h > 1 else 0)
        self._row = T.bind(index * writer.parts + part if s > 1 else index + T.int32(0))
        self._lists: Buffer = writer.lists
        self.count: Index = T.bind(self._lists[self._row, 0])

    def panel(self, place: Index) -> Index:
        """Which panel is the `place`-th."""
        return self._lists[self._row, place + 1]


def list_panels(writer: FlashWriter) -> None:
    """Emits the look at the mask: `writer.lists` holds a count and the panels seen, for every group of its rows."""
    bias = writer.a.bias
    assert bias is not None
    b, h, s, t = bias.shape
    queries = writer.tile.queries if s > 1 else 1
    parts = -(-s // queries)
    writer.lists = scratch((b * h * parts, writer.panels + 1), "int32")
    with loop(b * h * parts, parallel=writer.a.threads > 1) as item, T.sblock("look"):
        first = T.bind((item % parts) * queries)
        look = _Look(writer, bias, T.bind(T.floordiv(item, parts) * (s * t) + first * t), item)
        look.rows = T.bind(T.min(T.int32(queries), s - first)) if s % queries else queries
        look.emit()


class _Look:
    """One group of rows of the mask, from `origin` on."""

    rows: Index = 1

    def __init__(self, writer: FlashWriter, bias: Bias, origin: Index, item: Index) -> None:
        self.writer, self.bias, self.origin, self.item, self.lanes = writer, bias, origin, item, writer.lanes
        self.seen = scratch((2, self.lanes), "int32", registers=True)
        self.tail = scratch((self.lanes,), registers=True)

    def emit(self) -> None:
        """First what lies beyond scores counts as hidden; where a row then sees nothing, only -inf does."""
        self._list(BEYOND_SCORES)
        if self.bias.kind == "bool":
            return
        count = self.writer.lists[self.item, 0]
        with T.If(count < self.writer.panels), T.Then():
            store(self.seen, self._integers(1), 1, vec(0, self.lanes))
            with loop(self.rows) as row:
                self._clear()
                with loop(self.writer.lists[self.item, 0]) as place:
                    self._each(row, T.bind(self.writer.lists[self.item, place + 1]), SEEN)
                vectors.reduce_lanes(self.seen, 0, vectors.maximum, self.lanes)
                store(
                    self.seen,
                    self.seen[1, vec(0, self.lanes)] & self.seen[0, vec(0, self.lanes)],
                    1,
                    vec(0, self.lanes),
                )
            with T.If(self.seen[1, 0] == 0), T.Then():
                self._list(-float("inf"))

    def _list(self, hidden: float) -> None:
        """Panels of which some number is not `hidden` or less."""
        lists, item = self.writer.lists, self.item
        store(lists, T.int32(0), item, 0)
        with loop(self.writer.panels) as panel:
            self._clear()
            with loop(self.rows) as row:
                self._each(row, panel, hidden)
            vectors.reduce_lanes(self.seen, 0, vectors.maximum, self.lanes)
            with T.If(self.seen[0, 0] > 0), T.Then():
                store(lists, panel, item, lists[item, 0] + 1)
                store(lists, lists[item, 0] + 1, item, 0)

    def _clear(self) -> None:
        store(self.seen, self._integers(0), 0, vec(0, self.lanes))

    def _integers(self, value: int) -> Expression:
        return T.Broadcast(T.int32(value), self.lanes)

    def _each(self, row: Index, panel: Index, hidden: float) -> None:
        """Lanes of `seen` become 1 where the panel has a number above `hidden`, or NaN, in this row."""
        width = self.writer.width
        whole, left = emit.split(self.bias.shape[3], width)
        if not left:
            self._vectors(row, panel, width, hidden)
            return
        with T.If(panel < whole):
            with T.Then():
                self._vectors(row, panel, width, hidden)
            with T.Else():
                self._vectors(row, panel, left, hidden)

    def _vectors(self, row: Index, panel: Index, live: int, hidden: float) -> None:
        lanes, every = self.lanes, vec(0, self.lanes)
        for start, inside in emit.tiles(live, lanes):
            key = panel * self.writer.width + start
            at = self.origin + row * self.bias.shape[3]
            value = vectors.load_mask(self.writer.M, self.bias, at, key, inside, lanes, self.tail)
            if self.bias.kind == "bool":
                found = T.Select(value, self._integers(1), self._integers(0))
            else:
                limit = -T.infinity("float32") if hidden == -float("inf") else T.float32(hidden)
                found = T.Select(value <= splat(limit, lanes), self._integers(0), self._integers(1))
            if inside < lanes:
                found = T.Select(vectors.first_lanes(inside, lanes), found, self._integers(0))
            store(self.seen, self.seen[0, every] | found, 0, every)
