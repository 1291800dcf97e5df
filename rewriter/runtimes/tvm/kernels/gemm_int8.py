"""The packed GEMM on 8-bit integers by VNNI: scale and zero point per token of A, scale per channel of B, fp32 results.

The instruction multiplies unsigned by signed bytes: A has levels 0 to 255 around its zero points. The sums begin with
what the zero points add, minus zero point times column sum of B, and are exact in 32 bits for every K up to 2^16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, splat, vec
from rewriter.runtimes.tvm.kernels.expressions import ACTIVATIONS, coarse_gelu
from rewriter.runtimes.tvm.kernels.gemm import GROUP, Gemm, Tile, TileWriter, pack

FEATURE, LANES = "avx512_vnni", 16
INTRINSIC = "llvm.x86.avx512.vpdpbusd.512"
LEVELS = 127  # of weights, of either sign


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight matrix: ``weight_KN ~ levels_KN * scale_N``, levels from -127 to 127."""

    levels_KN: NDArray[np.int8]
    scale_N: NDArray[np.float32]

    @classmethod
    def of(cls, weight_KN: NDArray[np.float32]) -> Quantised:
        """Symmetric, each column by its largest magnitude. A column of zeros has scale zero."""
        largest = np.abs(weight_KN).max(axis=0, initial=0.0).astype(np.float32)
        levels = np.rint(weight_KN * (np.float32(LEVELS) / np.maximum(largest, np.float32(1e-30))))
        return cls(levels.astype(np.int8), largest / np.float32(LEVELS))

    def packed(self, width: int) -> NDArray[np.int32]:
        """(panels, depth, width) words of four k."""
        return pack(self.levels_KN, width, GROUP["int8"]).view(np.int32)[..., 0]

    def sums(self, width: int) -> NDArray[np.int32]:
        """The sum of the levels of each column, padded to whole panels."""
        return _padded(self.levels_KN.sum(axis=0, dtype=np.int32), width)

    def scales(self, width: int) -> NDArray[np.float32]:
        """The scales, padded to whole panels."""
        return _padded(self.scale_N, width)


def _padded(row: NDArray[Any], width: int) -> NDArray[Any]:
    return np.pad(row, (0, -len(row) % width))


def make_gemm_int8(gemm: Gemm, tile: Tile, name: str = "gemm_int8") -> Any:
    """PrimFunc (A, its scales, its zero points, packed B, its column sums, its scales, bias?, residual?, C)."""
    assert gemm.precision == "int8" and gemm.lanes == LANES
    columns = gemm.panels(tile) * gemm.lanes * tile.vectors
    arguments = [
        ("a", (*gemm.leading, gemm.depth), "int32"),
        ("a_scale", gemm.leading, "float32"),
        ("a_zero", gemm.leading, "int32"),
        ("b", gemm.packed_shape(tile), "int32"),
        ("b_sum", (columns,), "int32"),
        ("b_scale", (columns,), "float32"),
    ]
    if gemm.bias:
        arguments.append(("bias", (gemm.N,), "float32"))
    if gemm.residual:
        arguments.append(("residual", (*gemm.leading, gemm.N), "float32"))
    arguments.append(("c", (*gemm.leading, gemm.N), "float32"))
    return emit.prim_func(name, arguments, 1, _Writer(gemm, tile).body)


class _Writer(TileWriter):
    words = sums = "int32"
    activations: ClassVar = {**ACTIVATIONS, "gelu": coarse_gelu}  # beside what the operands were rounded by

    def body(self, *buffers: Buffer) -> None:
        """See `TileWriter.body`; what belongs to rows and columns is taken out of the way first."""
        a, a_scale, a_zero, b, self.b_sum, self.b_scale, *rest = buffers
        self.a_scale = emit.flat(a_scale, (self.gemm.M,))
        self.a_zero = emit.flat(a_zero, (self.gemm.M,), "int32")
        super().body(a, b, *rest)

    def _start(self, row: Index, panel: Index, n: int, columns: int) -> Expression:
        zero = splat(T.int32(0) - self.a_zero[row], LANES)
        return zero * self.b_sum[vec(panel * self.width + n * LANES, LANES)]

    def _product(self, total: Expression, a: Expression, b: Expression) -> Expression:
        bytes_a, bytes_b = (T.reinterpret("int8x64", words) for words in (splat(a, LANES), b))
        return T.call_llvm_intrin("int32x16", INTRINSIC, total, bytes_a, bytes_b)

    def _sum(self, row: Index, panel: Index, n: int, slot: int, columns: int) -> Expression:
        scale = self.b_scale[vec(panel * self.width + n * LANES, LANES)] * splat(self.a_scale[row], LANES)
        value = T.Cast("float32x16", self.acc[slot, vec(0, LANES)]) * scale
        return value if self.bias is None else value + self._bias(panel, n, columns)
