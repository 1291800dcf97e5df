"""The small space of an attention kernel for a tuner that measures: its tiles, and one compiled candidate.

`candidates` gives the default first; `FlashRunner` has what a tuner needs of a candidate: `tile`, `result()` for the
comparison with the first candidate, and `seconds(index)`, one run on one of `sets` rotating sets of operands.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels.attention import Attention, Operand, Tile
from rewriter.runtimes.tvm.kernels.flash import arguments_of, make_flash
from rewriter.runtimes.tvm.kernels.flash_bf16 import make_flash_bf16
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.tvm.tiles import Tiles

ROTATED_BYTES = 48 << 20  # beyond any cache that one core has to itself
MOST_SETS = 8
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # between candidates: they sum in different orders
MOST = 5


def candidates(spec: Attention, target: Target) -> list[Tile]:
    """The default tile, then blocks of fewer or more keys and groups of fewer or more queries; at most `MOST`."""
    default = Tiles(target).flash(spec)
    found = [default]
    for keys, groups in ((default.keys // 2, 1), (default.keys * 2, 1), (default.keys, 2), (default.keys // 2, 2)):
        queries = min(default.queries * groups, -(-spec.S // default.rows) * default.rows)
        tile = replace(default, queries=queries, keys=keys)
        if keys >= 64 and keys < 2 * spec.T and tile not in found:
            found.append(tile)
    return found[:MOST]


class FlashRunner:
    """One compiled candidate on normal operands; masks hide nothing, as a mask of zeros does."""

    def __init__(self, spec: Attention, tile: Tile, target: Target, precision: str = "fp32") -> None:
        self.spec, self.tile = spec, tile
        make = make_flash_bf16 if precision == "bf16" else make_flash
        module = tvm.IRModule({"main": make(spec, tile).with_attr("global_symbol", "main")})
        self._run = tvm.compile(module, target=tvm_target(target))["main"]
        arguments = arguments_of(spec)
        bytes_of_one = sum(4 * prod(shape) for _, shape, _ in arguments)
        self.sets = max(2, min(MOST_SETS, ROTATED_BYTES // bytes_of_one))
        self.operands = [self._drawn(arguments, seed) for seed in range(self.sets)]

    def _drawn(self, arguments: list[tuple[str, tuple[int, ...], str]], seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        drawn: list[NDArray[Any]] = []
        for name, shape, dtype in arguments:
            if name in ("q", "k", "v"):
                drawn.append(rng.standard_normal(shape, np.float32).astype(dtype))
            else:
                drawn.append(np.ones(shape, dtype) if dtype == "bool" else np.zeros(shape, dtype))
        return [tvm.runtime.tensor(array) for array in drawn]

    def result(self) -> NDArray[np.float32]:
        """The output on the first operands."""
        self._run(*self.operands[0])
        return np.array(self.operands[0][-1].numpy())

    def seconds(self, index: int) -> float:
        """One run on one set of operands."""
        operands = self.operands[index % self.sets]
        begun = time.perf_counter()
        self._run(*operands)
        return time.perf_counter() - begun


def subject_of(spec: Attention) -> tuple[str, tuple[int, ...]]:
    """(form, sizes): what names this attention in a tuning database beside precision and target."""

    def layout(operand: Operand) -> str:
        return "packed" if operand.token == operand.dim else "strided"

    bias = "none" if spec.bias is None else f"{spec.bias.kind}{''.join('01'[size > 1] for size in spec.bias.shape)}"
    form = f"{bias}:{layout(spec.query)}:{layout(spec.key)}:{int(spec.softcap != 0)}:{spec.empty_rows}"
    groups = len(set(zip(spec.key_head_of, spec.value_head_of, strict=True)))
    return form, (spec.B, spec.S, spec.T, spec.heads, groups, spec.key.dim, spec.value.dim)
