"""In a worker: build one candidate of a kernel, check it against the kernel as it was, and time it."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rewriter.core.target import Target
from rewriter.runtimes.tvm.target import tvm_target

TOLERANCE = 1e-3
ROTATED_BYTES = 48 << 20  # beyond any cache that one core has to itself
MOST_SETS = 8
MEASURE_S = 0.2
_references: dict[str, NDArray[Any]] = {}


def measure(plain: str, kernel: str, target: Target) -> float:
    """Median seconds on normal values and rotating buffers; RuntimeError when the result differs from `plain`'s."""
    from rewriter.runtimes.tvm.metaschedule import unpacked

    module = unpacked(kernel)
    built = tvm.tirx.build(module, target=tvm_target(target))["main"]
    arrays = _arrays(plain)
    wanted = _reference(plain, target)
    sets = max(2, min(MOST_SETS, ROTATED_BYTES // max(1, sum(array.nbytes for array in arrays))))
    operands = [[tvm.runtime.tensor(array) for array in arrays] for _ in range(sets)]
    built(*operands[0])
    found = operands[0][-1].numpy()
    if not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise RuntimeError("the result differs from that of the kernel before scheduling")
    samples: list[float] = []
    end_s = time.perf_counter() + MEASURE_S
    while len(samples) < 5 or (time.perf_counter() < end_s and len(samples) < 200):
        chosen = operands[len(samples) % sets]
        begun = time.perf_counter()
        built(*chosen)
        samples.append(time.perf_counter() - begun)
    return float(np.median(samples))


@lru_cache(maxsize=4)
def _arrays(plain: str) -> tuple[NDArray[Any], ...]:
    """Normal values, whole numbers zero, for every argument."""
    from tvm.s_tir import meta_schedule as ms

    from rewriter.runtimes.tvm.metaschedule import unpacked

    rng, found = np.random.default_rng(0), []
    for info in ms.arg_info.ArgInfo.from_entry_func(unpacked(plain), False):
        shape, dtype = tuple(int(size) for size in info.shape), np.dtype(str(info.dtype))
        found.append(rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype))
    return tuple(found)


def _reference(plain: str, target: Target) -> NDArray[Any]:
    """What the kernel gives before scheduling; kept for the candidates that follow."""
    from rewriter.runtimes.tvm.metaschedule import unpacked

    if plain in _references:
        return _references[plain]
    operands = [tvm.runtime.tensor(array) for array in _arrays(plain)]
    tvm.tirx.build(unpacked(plain), target=tvm_target(target))["main"](*operands)
    _references.clear()
    _references[plain] = np.array(operands[-1].numpy())
    return _references[plain]
