"""What the matrix unit of this processor can do at most, measured: products alone, without a load or a store."""

from __future__ import annotations

import time

import numpy as np
import tvm

from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.kernels import amx_peak
from rewriter.runtimes.tvm.kernels.amx import ROWS
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Precision
from rewriter.runtimes.tvm.target import tvm_target

TURNS = 2000  # a tenth of a millisecond
REPEATS = 20


def products_per_s(target: Target, precision: Precision, turns: int = TURNS, repeats: int = REPEATS) -> float:
    """Operations (two per product) per second of all threads, if each core has a unit of its own. Asks permission."""
    amx.ask_for(target)
    kernel = amx_peak.make_products(turns, precision).with_attr("global_symbol", "main")
    run = tvm.compile(tvm.IRModule({"main": kernel}), target=tvm_target(target))["main"]
    shape = (amx_peak.SUMS, ROWS, MATRIX_WORDS)
    operand = tvm.runtime.tensor(np.zeros(shape[1:], np.int32))
    sums = tvm.runtime.tensor(np.zeros(shape, np.float32 if precision == "bf16" else np.int32))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run(operand, sums)
        seconds.append(time.perf_counter() - begun)
    return target.threads * amx_peak.operations(turns, precision) / min(seconds)
