"""Products of two computed matrices, batch by batch: B is packed inside the kernel, then the GEMM's tiles run."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Index, loop, store, vec
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Tile, TileWriter


@dataclass(frozen=True)
class MatMul:
    """A (*batch, M, K) @ B (*batch or none, K, N)."""

    batch: tuple[int, ...]
    M: int
    N: int
    K: int
    shared: bool = False
    lanes: int = 16
    threads: int = 1


def make_matmul(spec: MatMul, tile: Tile, name: str = "matmul") -> Any:
    """PrimFunc (A, B, C)."""
    right = (spec.K, spec.N) if spec.shared else (*spec.batch, spec.K, spec.N)
    arguments = [
        ("a", (*spec.batch, spec.M, spec.K), "float32"),
        ("b", right, "float32"),
        ("c", (*spec.batch, spec.M, spec.N), "float32"),
    ]
    return emit.prim_func(name, arguments, 1, lambda *buffers: _body(spec, tile, *buffers))


def _body(spec: MatMul, tile: Tile, a: Buffer, b: Buffer, c: Buffer) -> None:
    count = prod(spec.batch)
    B = emit.flat(b, (1 if spec.shared else count, spec.K, spec.N))
    with loop(count, parallel=spec.threads > 1) as item, T.sblock("product"):
        writer = TileWriter(Gemm((count * spec.M,), spec.N, spec.K, lanes=spec.lanes), tile)
        packed = emit.scratch(writer.gemm.packed_shape(tile))
        _pack(spec, writer.width, B, 0 if spec.shared else item, packed)
        writer.bind(emit.flat(a, (count * spec.M, spec.K)), packed, emit.flat(c, (count * spec.M, spec.N)))
        writer.panels(item * spec.M, spec.M)


def _pack(spec: MatMul, width: int, B: Buffer, item: Index, packed: Buffer) -> None:
    lanes = spec.lanes
    full, left = emit.split(spec.N, lanes)
    with loop(spec.K) as k:
        for part in range(full):
            at = part * lanes
            store(packed, B[item, k, vec(at, lanes)], at // width, k, vec(at % width, lanes))
        for at in range(full * lanes, -(-spec.N // width) * width):
            inside = at < full * lanes + left
            store(packed, B[item, k, at] if inside else T.float32(0), at // width, k, at % width)
