"""Products on matrix tiles and nothing else, which is what the matrix unit can do at most."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import amx, emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, loop
from rewriter.runtimes.tvm.kernels.gemm import GROUP, MATRIX_WORDS, Precision

SUMS = 4  # tiles of sums in turn, as GEMMs have; a product waits for the one before it on the same tile


def make_products(turns: int, precision: Precision, name: str = "products") -> Any:
    """PrimFunc (operand, sums): each of `SUMS` tiles gains `turns` times the product of one tile with itself."""

    def body(operand: Buffer, sums: Buffer) -> None:
        with amx.configured([amx.ROWS] * amx.TILES):
            for tile in range(SUMS):
                amx.zero(tile)
            for tile in (SUMS, SUMS + 1):
                amx.load(tile, T.address_of(operand[0, 0]), amx.ROW_BYTES)
            with loop(turns):
                for tile in range(SUMS):
                    amx.dot(tile, SUMS, SUMS + 1, precision)
            for tile in range(SUMS):
                amx.keep(tile, T.address_of(sums[tile, 0, 0]), amx.ROW_BYTES)

    dtype = "float32" if precision == "bf16" else "int32"
    arguments = [("operand", (amx.ROWS, MATRIX_WORDS), "int32"), ("sums", (SUMS, amx.ROWS, MATRIX_WORDS), dtype)]
    return amx.requiring(emit.prim_func(name, arguments, 1, body), precision)


def operations(turns: int, precision: Precision) -> int:
    """Of one call, two per product."""
    return 2 * turns * SUMS * amx.ROWS * MATRIX_WORDS * MATRIX_WORDS * GROUP[precision]
