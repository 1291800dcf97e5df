"""The packed GEMM on bfloat16 by AVX512-BF16: pairs of k are multiplied and added to fp32 sums."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, splat
from rewriter.runtimes.tvm.kernels.expressions import ACTIVATIONS, coarse_gelu
from rewriter.runtimes.tvm.kernels.gemm import GROUP, Gemm, Tile, TileWriter, pack

FEATURE, LANES = "avx512_bf16", 16
# TVM rewrites every bfloat16 it sees, so the instruction hides in a function that takes words and is always inlined.
DOT = "rewriter_dot_bf16x32"
SOURCE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x float> @{DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""


def rounded_bits(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 of every element as its bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded.astype(np.uint16))


def rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every element rounded to bfloat16, as fp32."""
    return (rounded_bits(array).astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_bf16(weight_KN: NDArray[np.float32], width: int) -> NDArray[np.int32]:
    """(panels, depth, width) words of two k."""
    return pack(rounded_bits(weight_KN), width, GROUP["bf16"]).view(np.int32)[..., 0]


def make_gemm_bf16(gemm: Gemm, tile: Tile, name: str = "gemm_bf16") -> Any:
    """PrimFunc (words of A, packed B, bias?, residual?, C)."""
    assert gemm.precision == "bf16" and gemm.lanes == LANES
    arguments = [("a", (*gemm.leading, gemm.depth), "int32"), ("b", gemm.packed_shape(tile), "int32")]
    if gemm.bias:
        arguments.append(("bias", (gemm.N,), "float32"))
    if gemm.residual:
        arguments.append(("residual", (*gemm.leading, gemm.N), "float32"))
    arguments.append(("c", (*gemm.leading, gemm.N), "float32"))
    return emit.prim_func(name, arguments, 1, _Writer(gemm, tile).body)


class _Writer(TileWriter):
    words = "int32"
    activations: ClassVar = {**ACTIVATIONS, "gelu": coarse_gelu}  # beside what the operands were rounded by

    def body(self, *buffers: Buffer) -> None:
        """See `TileWriter.body`; with the instruction imported."""
        with T.attr(0, "pragma_import_llvm", SOURCE):
            super().body(*buffers)

    def _product(self, total: Expression, a: Expression, b: Expression) -> Expression:
        return T.call_extern("float32x16", DOT, total, splat(a, LANES), b)
