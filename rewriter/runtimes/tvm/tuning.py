"""Which register tile a GEMM shape likes best, found by measuring a handful.

Candidates come from the register file (sums for rows x vectors must fit), the best few by a roofline model are measured
in turn, on normal values and rotating buffers: warm weights and uniform inputs mislead by up to two times. Those that
have no chance after a few looks are dropped. One shape takes about a second.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.database import Subject, TuningDatabase
from rewriter.runtimes.tvm.kernels import formats
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Gemm, Tile
from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.tvm.tiles import unroll_for

CANDIDATES = {32: ((8, 3), (12, 2), (6, 4), (9, 3), (13, 2), (24, 1)), 16: ((6, 2), (4, 3), (5, 2), (12, 1))}
MOST = 5  # candidates measured per shape, the default among them
MEASURE_S = 0.6  # for all candidates of one shape together
ROTATED_BYTES = 48 << 20  # beyond any cache that one core has to itself
TOLERANCE = 1e-3
LOOKS, HOPELESS = 3, 1.25  # a candidate whose best of three is this much slower than the best is dropped
DECIDES = 0.99  # a challenger must take less than this share of the default's time


@dataclass(frozen=True)
class Timing:
    """A candidate and its median."""

    tile: Tile
    seconds: float


class GemmTuner:
    """Finds tiles in a database, or measures them and records what it found."""

    def __init__(self, target: Target, database: TuningDatabase, measure: bool = True) -> None:
        self.target, self.database, self.measure = target, database, measure

    def tile(self, spec: Gemm, default: Tile) -> Tile:
        """The best known tile for a GEMM; `default` if nothing is known and measuring is off, or nothing beats it."""
        form = ("" if spec.precision == "fp32" else f"_{spec.precision}") + "_amx" * spec.matrix_unit
        kernel = f"gemm{form}:{spec.activation}:{int(spec.residual)}"
        subject = Subject.of(kernel, (spec.M, spec.N, spec.K), self.target)
        known = self.database.find(subject)
        if known is not None:
            return Tile(**known["tile"])
        if not self.measure:
            return default
        timings = measure_tiles(spec, candidates(spec, self.target, default), self.target)
        best = min(timings, key=lambda timing: timing.seconds)
        first = timings[0]
        chosen = best if best.seconds < DECIDES * first.seconds else first
        self.database.add(subject, {"tile": asdict(chosen.tile), "seconds": chosen.seconds, "tried": len(timings)})
        return chosen.tile


def candidates(spec: Gemm, target: Target, default: Tile) -> list[Tile]:
    """The default, then the shapes of the register tile that the model finds best, with rows balanced over M."""
    if spec.matrix_unit:
        forms = itertools.product((default.ahead, not default.ahead), (default.overlap, not default.overlap))
        return [replace(default, ahead=ahead, overlap=overlap) for ahead, overlap in forms]
    found: list[Tile] = []
    for most, vectors in CANDIDATES[target.registers]:
        rows = -(-spec.M // -(-spec.M // most))
        waste = -(-spec.N // (vectors * spec.lanes)) * vectors * spec.lanes / spec.N
        tile = Tile(rows, vectors, unroll_for(spec, rows, vectors), default.block, default.ahead)
        if tile not in (default, *found) and waste < 1.34:
            found.append(tile)
    return [default, *sorted(found, key=lambda tile: predicted(spec, tile))[: MOST - 1]]


def predicted(spec: Gemm, tile: Tile) -> float:
    """Cycles per step of k by a roofline of one core: two products and two loads of vectors per cycle at best."""
    full, left = divmod(spec.M, tile.rows)
    panels = -(-spec.N // (tile.vectors * spec.lanes))

    def step(rows: int) -> float:
        return max(rows * tile.vectors, tile.vectors + rows) / 2.0 if rows else 0.0

    return panels * (full * step(tile.rows) + step(left))


def measure_tiles(spec: Gemm, tiles: list[Tile], target: Target) -> list[Timing]:
    """Medians of all tiles, taken in turn; a tile whose result is wrong is left out."""
    rng = np.random.default_rng(0)
    sets = max(2, min(16, ROTATED_BYTES // (4 * spec.N * spec.K)))
    weights = [rng.standard_normal((spec.K, spec.N), np.float32) / np.float32(spec.K**0.5) for _ in range(sets)]
    rest = _other_inputs(spec, rng)
    runners = [Runner(spec, tile, target, weights, rest) for tile in tiles]
    reference = runners[0].result()
    runners = [runner for runner in runners if np.abs(runner.result() - reference).max() < TOLERANCE]
    samples: dict[Tile, list[float]] = {runner.tile: [] for runner in runners}
    deadline, turn = time.perf_counter() + MEASURE_S, 0
    while turn < 3 or time.perf_counter() < deadline:
        for runner in runners:
            samples[runner.tile].append(runner.seconds(turn % sets))
        turn += 1
        runners = contenders(runners, samples)
    return [Timing(tile, float(np.median(values))) for tile, values in samples.items()]


def contenders(runners: list[Runner], samples: Mapping[Tile, Sequence[float]]) -> list[Runner]:
    """The candidates that may still win, and the first, which all are compared with: time goes to where it decides."""
    least = {runner.tile: min(samples[runner.tile]) for runner in runners}
    if len(samples[runners[0].tile]) < LOOKS:
        return runners
    best = min(least.values())
    return [runner for runner in runners if runner is runners[0] or least[runner.tile] <= HOPELESS * best]


def _other_inputs(spec: Gemm, rng: np.random.Generator) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    a = rng.standard_normal((*spec.leading, spec.K), np.float32)
    rest = [rng.standard_normal(spec.N, np.float32)] if spec.bias else []
    return a, [*rest, *([rng.standard_normal((*spec.leading, spec.N), np.float32)] if spec.residual else [])]


def _compiled(function: Any, target: Target) -> Any:
    amx.ask_for(target)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm_target(target))["main"]


def _activations(spec: Gemm, a: NDArray[np.float32], target: Target) -> list[Any]:
    """The operands that a kernel of this format takes for A."""
    if spec.precision == "fp32":
        return [tvm.runtime.tensor(a)]
    rounding = Quantise(a.shape, spec.precision, spec.lanes, multiple=MATRIX_WORDS if spec.matrix_unit else 1)
    outputs = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in rounding.outputs]
    _compiled(make_quantise(rounding), target)(tvm.runtime.tensor(a), *outputs)
    return outputs


def runner_of(spec: Gemm, tile: Tile, target: Target) -> Runner:
    """One GEMM on one set of normal operands."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((spec.K, spec.N), np.float32) / np.float32(spec.K**0.5)]
    return Runner(spec, tile, target, weights, _other_inputs(spec, rng))


class Runner:
    """One compiled candidate with its rotating weights."""

    def __init__(
        self, spec: Gemm, tile: Tile, target: Target, weights: list[NDArray[np.float32]], rest: tuple[Any, list[Any]]
    ) -> None:
        self.tile = tile
        self._run = _compiled(formats.make(spec, tile), target)
        left, others = _activations(spec, rest[0], target), [tvm.runtime.tensor(array) for array in rest[1]]
        self._out = tvm.runtime.tensor(np.zeros((*spec.leading, spec.N), np.float32))
        self._arguments = []
        for weight in weights:
            packed = formats.weight_operands(
                weight, spec.precision, spec.precision, tile.vectors * spec.lanes, spec.matrix_unit
            )
            self._arguments.append((*left, *map(tvm.runtime.tensor, packed), *others, self._out))

    def result(self) -> NDArray[np.float32]:
        """The output on the first weights."""
        self._run(*self._arguments[0])
        return np.array(self._out.numpy())

    def seconds(self, index: int) -> float:
        """One run on one set of weights."""
        begun = time.perf_counter()
        self._run(*self._arguments[index])
        return time.perf_counter() - begun
