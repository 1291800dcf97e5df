"""How many operations a kernel does: multiplications and additions of its products; what is left moves memory."""

from __future__ import annotations

from collections.abc import Hashable
from functools import singledispatch
from math import prod

from rewriter.runtimes.tvm.kernels.attention import Attention
from rewriter.runtimes.tvm.kernels.gemm import Gemm
from rewriter.runtimes.tvm.kernels.matmul import MatMul


@singledispatch
def operations(specification: Hashable) -> int:
    """Of one call; 0 for kernels without products. A pair of specification and tile counts as its specification."""
    return operations(specification[0]) if isinstance(specification, tuple) and specification else 0


@operations.register
def _gemm(specification: Gemm) -> int:
    return 2 * specification.M * specification.N * specification.K


@operations.register
def _matmul(specification: MatMul) -> int:
    return 2 * prod(specification.batch) * specification.M * specification.N * specification.K


@operations.register
def _attention(specification: Attention) -> int:
    scores = specification.B * specification.heads * specification.S * specification.T
    return 2 * scores * (specification.query.dim + specification.value.dim)
