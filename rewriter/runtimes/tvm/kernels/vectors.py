"""Work across lanes: horizontal reductions, transposition, partial loads and stores."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels.attention import Bias
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, scratch, store, vec


def fold(value: Expression, distance: int, lanes: int) -> Expression:
    """Lanes exchanged at a distance."""
    return T.Shuffle([value], [lane ^ distance for lane in range(lanes)])


def reduce_lanes(
    buffer: Buffer, row: Index, combine: Callable[[Expression, Expression], Expression], lanes: int
) -> None:
    """Every lane of buffer[row] becomes the reduction over all lanes."""
    distance = lanes // 2
    while distance:
        here = buffer[row, vec(0, lanes)]
        store(buffer, combine(here, fold(here, distance, lanes)), row, vec(0, lanes))
        distance //= 2


def add(a: Expression, b: Expression) -> Expression:
    """For `reduce_lanes`."""
    return a + b


def maximum(a: Expression, b: Expression) -> Expression:
    """For `reduce_lanes`."""
    return T.max(a, b)


def minimum(a: Expression, b: Expression) -> Expression:
    """For `reduce_lanes`."""
    return T.min(a, b)


def transpose(block: Buffer, lanes: int) -> None:
    """Transposes block (lanes, lanes), held in registers, by log2(lanes) rounds of exchanges between pairs of rows."""
    distance = 1
    while distance < lanes:
        low = [lane if not lane & distance else lanes + (lane ^ distance) for lane in range(lanes)]
        high = [lane | distance if not lane & distance else lanes + lane for lane in range(lanes)]
        for row in range(lanes):
            if row & distance:
                continue
            pair = [block[row, vec(0, lanes)], block[row + distance, vec(0, lanes)]]
            first = T.bind(T.Shuffle(pair, low))
            second = T.bind(T.Shuffle(pair, high))
            store(block, first, row, vec(0, lanes))
            store(block, second, row + distance, vec(0, lanes))
        distance *= 2


def sums_of_rows(block: Buffer, lanes: int) -> None:
    """block[0], lane i = the sum of block[i], by log2(lanes) rounds that halve the number of vectors."""
    distance = lanes // 2
    while distance:
        order = [lane ^ distance if not lane & distance else lanes + (lane ^ distance) for lane in range(lanes)]
        stay = [lane if not lane & distance else lanes + lane for lane in range(lanes)]
        for row in range(distance):
            pair = [block[row, vec(0, lanes)], block[row + distance, vec(0, lanes)]]
            store(block, T.Shuffle(pair, stay) + T.Shuffle(pair, order), row, vec(0, lanes))
        distance //= 2


def load_part(source: Callable[[int], Expression], live: int, tail: Buffer, lanes: int, fill: Expression) -> Expression:
    """A vector of which only the first `live` lanes exist in memory; the others are `fill`."""
    for lane in range(lanes):
        store(tail, source(lane) if lane < live else fill, lane)
    return tail[vec(0, lanes)]


def first_lanes(count: int, lanes: int) -> Expression:
    """True in the first `count` lanes."""
    return T.Ramp(T.int32(0), 1, lanes) < T.Broadcast(T.int32(count), lanes)


def load_mask(buffer: Buffer, bias: Bias, row: Index, key: Index, inside: int, lanes: int, tail: Buffer) -> Expression:
    """A vector of keys of a mask whose row begins at `row`, of which the first `inside` exist in memory."""
    if bias.shape[3] == 1:
        return T.Broadcast(buffer[row], lanes)
    if inside == lanes:
        return buffer[vec(row + key, lanes)]
    add = bias.kind == "add"
    place = tail if add else scratch((lanes,), "bool")
    return load_part(
        lambda lane: buffer[row + key + lane], inside, place, lanes, T.float32(0) if add else T.bool(False)
    )
