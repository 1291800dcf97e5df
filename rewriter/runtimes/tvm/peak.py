"""What this processor can do at most, measured: products out of the first-level cache, and bytes from memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision
from rewriter.runtimes.tvm.tiles import default_gemm
from rewriter.runtimes.tvm.tuning import runner_of

_K = 256
_COPIED_BYTES = 128 << 20
_TURNS = 7


def products_per_s(target: Target, precision: Precision) -> float:
    """Operations (two per product) per second of a GEMM whose operands lie in the first-level cache."""
    lanes = target.vector_floats
    tile = default_gemm(Gemm((48,), 3 * lanes, _K, lanes=lanes), target)
    columns = tile.vectors * lanes
    spec = Gemm((tile.rows * 4,), columns, _K, lanes=lanes, precision=precision)
    runner = runner_of(spec, tile, target)
    once = runner.seconds(0)
    repeats = max(10, int(2e-3 / max(once, 1e-7)))
    best = min(_of(lambda: [runner.seconds(0) for _ in range(repeats)]) / repeats for _ in range(_TURNS))
    return target.threads * 2.0 * spec.M * spec.N * spec.K / best


def bytes_per_s() -> float:
    """Bytes read and written per second by copying an array that no cache holds; one thread."""
    source, copy = np.ones(_COPIED_BYTES, np.uint8), np.empty(_COPIED_BYTES, np.uint8)
    return 2.0 * _COPIED_BYTES / min(_of(lambda: np.copyto(copy, source)) for _ in range(_TURNS))


def _of(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun
