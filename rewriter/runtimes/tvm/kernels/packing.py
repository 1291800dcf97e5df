"""Operands of attention as its kernels like them: keys transposed into panels, values and queries side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit, vectors
from rewriter.runtimes.tvm.kernels.emit import Buffer, Index, loop, scratch, splat, store, vec

if TYPE_CHECKING:
    from rewriter.runtimes.tvm.kernels.flash import FlashWriter


def pack_keys(writer: FlashWriter) -> None:
    """K of this head, scaled, transposed into panels (panels, dim, width); keys beyond T are zero."""
    a, lanes = writer.a, writer.lanes
    square = scratch((lanes, lanes), registers=True)
    origin, padded = writer.origin(a.key, a.key_head_of), writer.panels * writer.width
    full, left = emit.split(a.T, lanes)
    dims, rest = emit.split(a.key.dim, lanes)

    def slot(token: Index, dim: Index, count: int) -> tuple[Index, Index, Index]:
        return T.floordiv(token, writer.width), dim, vec(T.floormod(token, writer.width), count)

    def by_scalars(tokens: tuple[int, int], dims: tuple[int, int]) -> None:
        with loop(tokens[1] - tokens[0]) as t, loop(dims[1] - dims[0]) as d:
            value = writer.K[origin + (tokens[0] + t) * a.key.token + (dims[0] + d)]
            store(writer.Kt, value * T.float32(a.scale), *slot(tokens[0] + t, dims[0] + d, 1))

    if full and dims:
        with loop(full) as strip, loop(dims) as part:
            for row in range(lanes):
                at = origin + (strip * lanes + row) * a.key.token + part * lanes
                store(square, writer.K[vec(at, lanes)] * splat(a.scale, lanes), row, vec(0, lanes))
            vectors.transpose(square, lanes)
            for row in range(lanes):
                store(writer.Kt, square[row, vec(0, lanes)], *slot(strip * lanes, part * lanes + row, lanes))
    if full and rest:
        by_scalars((0, full * lanes), (dims * lanes, a.key.dim))
    if left:
        by_scalars((full * lanes, a.T), (0, a.key.dim))
    if padded > a.T:
        with loop(padded - a.T) as token, loop(a.key.dim) as dim:
            store(writer.Kt, T.float32(0), *slot(a.T + token, dim, 1))


def pack_values(writer: FlashWriter) -> None:
    """V of this head, contiguous, dims and tokens padded with zeros."""
    a, lanes = writer.a, writer.lanes
    origin = writer.origin(a.value, a.value_head_of)
    with loop(a.T) as token:
        copy_row(writer, writer.V, origin + token * a.value.token, writer.Vp, token, a.value.dim, pad=True)
    padding = writer.panels * writer.width - a.T
    if padding:
        with loop(padding) as token, loop(writer.out_vectors) as part:
            store(writer.Vp, emit.zero_for(lanes), a.T + token, vec(part * lanes, lanes))


def copy_row(
    writer: FlashWriter, source: Buffer, at: Index, target: Buffer, row: Index, dim: int, pad: bool = False
) -> None:
    """target[row, :dim] = source[at : at + dim]; `pad`: zeros up to whole vectors."""
    lanes, (full, left) = writer.lanes, emit.split(dim, writer.lanes)
    for part in range(full):
        store(target, source[vec(at + part * lanes, lanes)], row, vec(part * lanes, lanes))
    for lane in range((lanes if pad else left) if left else 0):
        value = source[at + full * lanes + lane] if lane < left else T.float32(0)
        store(target, value, row, full * lanes + lane)
