"""The number formats of GEMMs behind one interface: which kernel, and what a weight becomes for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.runtimes.tvm.kernels.amx_gemm import make_gemm_amx
from rewriter.runtimes.tvm.kernels.gemm import GROUP, MATRIX_WORDS, Gemm, Precision, Tile, make_gemm, pack
from rewriter.runtimes.tvm.kernels.gemm_bf16 import make_gemm_bf16, pack_bf16, rounded
from rewriter.runtimes.tvm.kernels.gemm_int8 import Quantised, make_gemm_int8

_KERNELS: dict[Precision, Callable[[Gemm, Tile, str], Any]] = {
    "fp32": make_gemm,
    "bf16": make_gemm_bf16,
    "int8": make_gemm_int8,
}
MOST_TERMS = 1 << 16  # products of bytes that surely fit into 32 bits together
WEIGHT_OPERANDS: dict[Precision, int] = {"fp32": 1, "bf16": 1, "int8": 3}


def make(gemm: Gemm, tile: Tile, name: str = "gemm") -> Any:
    """PrimFunc (operands of A, operands of B, bias?, residual?, C) in the format of `gemm`."""
    return (make_gemm_amx if gemm.matrix_unit else _KERNELS[gemm.precision])(gemm, tile, name)


def weight_operands(
    weight_KN: NDArray[np.float32], precision: Precision, held: Precision, width: int, matrix_unit: bool = False
) -> tuple[NDArray[Any], ...]:
    """A weight rounded to `precision` as the operands of the kernel of `held`: the same, or fp32."""
    if matrix_unit:
        weight_KN = np.pad(weight_KN, ((0, -len(weight_KN) % (GROUP[held] * MATRIX_WORDS)), (0, 0)))
    if held == "fp32":
        return (pack(as_rounded(weight_KN, precision), width),)
    if held == "bf16":
        return (pack_bf16(weight_KN, width),)
    weight = Quantised.of(weight_KN)
    return weight.packed(width), weight.sums(width), weight.scales(width)


def as_rounded(weight_KN: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """A weight with the rounding of a format, as fp32."""
    if precision == "fp32":
        return weight_KN
    if precision == "bf16":
        return rounded(weight_KN)
    weight = Quantised.of(weight_KN)
    return weight.levels_KN.astype(np.float32) * weight.scale_N
