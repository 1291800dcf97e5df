"""``python -m rewriter.benchmark.gemm_peak``: what GEMMs reach at the shapes of models, as a share of the peak.

The peak is measured too: the same products with all operands in registers and the first-level cache. Every kernel runs
in the tuner's guarded, pinned process, checked against numpy, on weights that no cache holds. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.core.errors import ModelError, UserError
from rewriter.core.target import Target
from rewriter.runtimes.tvm.database import TuningDatabase
from rewriter.runtimes.tvm.gemm_space import GemmSpace
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.tvm.tuning import Tuner, guarded
from rewriter.runtimes.workers import WorkerFailure

# Rows x columns x depth: MiniLM at 16, 128, 512 and 8 x 128 tokens, ViT-Base at 197 patches, one token at a time.
SHAPES = (
    "128x384x384", "128x1152x384", "128x1536x384", "128x384x1536", "512x384x384", "512x1536x384", "512x384x1536",
    "16x384x384", "16x1536x384", "16x384x1536", "1024x1536x384", "1024x384x1536", "197x2304x768", "197x3072x768",
    "197x768x3072", "1x1536x384", "1x384x1536",
)  # fmt: skip
FORMATS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_PEAK = "rewriter.runtimes.tvm.peak"


@dataclass(frozen=True)
class Reached:
    """One GEMM: seconds by default and as tuned, and what products and memory alone would take."""

    shape: str
    precision: Precision
    default_s: float
    seconds: float
    products_s: float
    memory_s: float
    tile: str

    def row(self) -> str:
        """One line of the table."""
        bound = "memory" if self.memory_s > self.products_s else "products"
        share, before = self.products_s / self.seconds, self.products_s / self.default_s
        roofline = max(self.products_s, self.memory_s) / self.seconds
        return (
            f"| {self.shape} | {self.precision} | {1e6 * self.seconds:.0f} us | {100 * before:.0f} % | "
            f"{100 * share:.0f} % | {100 * roofline:.0f} % ({bound}) | {self.tile} |"
        )


def epilogue(shape: str) -> tuple[int, int, int, str, bool]:
    """(M, N, K, activation, residual) as models have them: GELU where it widens, a residual where it does not."""
    try:
        rows, columns, depth = (int(size) for size in shape.split("x"))
    except ValueError as error:
        raise ModelError(f"{shape!r} is no GEMM", "Write rows x columns x depth, like 128x384x1536") from error
    return rows, columns, depth, "gelu" if columns == 4 * depth else "", columns <= depth


def measure(
    shapes: Sequence[str], formats: Sequence[Precision], threads: int
) -> tuple[list[Reached], dict[str, float]]:
    """Every shape in every format that the processor multiplies, and the peaks (operations and bytes per second)."""
    target = detect("cpu", threads)
    formats = [form for form in formats if target.multiplies(form)]
    peaks = {form: _asked("products_per_s", target, form) for form in formats} | {"bytes": _asked("bytes_per_s")}
    with tempfile.TemporaryDirectory(prefix="gemm-peak-") as folder:
        tuner = Tuner(target, TuningDatabase(Path(folder) / "tuning.jsonl"), budget_s=float("inf"))
        return [_reached(shape, form, target, tuner, peaks) for form in formats for shape in shapes], peaks


def _reached(shape: str, form: Precision, target: Target, tuner: Tuner, peaks: dict[str, float]) -> Reached:
    rows, columns, depth, activation, residual = epilogue(shape)
    lanes, unit = target.vector_floats, target.has_matrix_unit(form)
    spec = Gemm((rows,), columns, depth, True, activation, residual, lanes, target.threads, form, unit)
    space = GemmSpace.of(spec, target)
    tile = tuner.best(space)
    found = tuner.database.find(space.subject)
    assert found is not None, "a GEMM has more than one tile, so it was measured"
    stored = {"fp32": 4, "bf16": 2, "int8": 1}[form]
    moved = stored * (rows * depth + depth * columns) + 4 * rows * columns * (2 if residual else 1)
    products_s = 2 * rows * columns * depth / peaks[form]
    named = f"{tile.rows} x {tile.vectors}, {tile.unroll}{', ahead' * tile.ahead}{', by rows' * tile.by_rows}"
    return Reached(shape, form, found["default_seconds"], found["seconds"], products_s, moved / peaks["bytes"], named)


def _asked(function: str, *arguments: Any) -> float:
    threads = arguments[0].threads if arguments else 1
    found = guarded(threads).call(f"{_PEAK}:{function}", *arguments, timeout_s=60.0)
    if isinstance(found, WorkerFailure):
        raise ModelError(f"the peak of this processor could not be measured: {found}", "Run it again")
    return float(found)


def table(rows: Sequence[Reached], peaks: dict[str, float], threads: int) -> str:
    """Markdown."""
    named = ", ".join(f"{form} {value / 1e9:.0f}" for form, value in peaks.items() if form != "bytes")
    lines = [
        f"{threads} thread(s). Peaks: {named} GOP/s; {peaks['bytes'] / 1e9:.0f} GB/s by copying.",
        "",
        "| M x N x K | format | time | of peak, default tile | of peak, tuned | of the roofline | tile, unroll |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(row.row() for row in rows)])


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m rewriter.benchmark.gemm_peak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="MxNxK,...")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="fp32,...")
    parsed = parser.parse_args()
    try:
        rows, peaks = measure(parsed.shapes.split(","), parsed.formats.split(","), parsed.threads)
    except UserError as error:
        sys.stderr.write(f"gemm_peak: {error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{table(rows, peaks, parsed.threads)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
