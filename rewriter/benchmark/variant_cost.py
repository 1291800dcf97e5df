"""``python -m rewriter.benchmark.variant_cost MODEL.onnx``: what one more variant of a model costs, step by step.

Variants are built and loaded one after the other, as a search does, in one long-lived process with one cache: the exact
graph, the same kernels arranged anew, and such with a shape that nobody has seen. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.errors import ModelError, UserError
from rewriter.core.site import FeedForwardSite, Site, State
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.runtimes.tvm.runtime import TvmRuntime
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure

KNOWN, FRESH = 1152, 1216  # hidden units: of one shape that a variant may share, and of one that is new
_HERE = "rewriter.benchmark.variant_cost"


@dataclass(frozen=True)
class Cost:
    """Seconds of one variant: writing the graph, building, loading with a first run; kernels that were compiled."""

    name: str
    saved_s: float
    built_s: float
    loaded_s: float
    kernels: int

    @property
    def row(self) -> str:
        """One line of the table."""
        parts = (self.saved_s, self.built_s, self.loaded_s, self.saved_s + self.built_s + self.loaded_s)
        return f"| {self.name} | {self.kernels} | " + " | ".join(f"{seconds:.2f} s" for seconds in parts) + " |"


def narrowed(site: Site, width: int) -> Site:
    """A feed-forward with fewer hidden units; which ones matters to nobody who measures time."""
    assert isinstance(site, FeedForwardSite)
    return replace(
        site,
        up_CF=site.up_CF[:, :width],
        down_FC=site.down_FC[:width],
        up_bias_F=None if site.up_bias_F is None else site.up_bias_F[:width],
        gate_CF=None if site.gate_CF is None else site.gate_CF[:, :width],
        gate_bias_F=None if site.gate_bias_F is None else site.gate_bias_F[:width],
    )


def variants(graph: OnnxGraph) -> list[tuple[str, OnnxGraph]]:
    """(what it is, lowered graph), in the order in which they are built."""
    sites = [site for site in recognise(graph).sites if site.state is State.LOWERABLE]
    blocks = [site.id for site in sites if isinstance(site, FeedForwardSite)]
    if len(blocks) < 2:
        raise ModelError("the model has fewer than two feed-forward blocks", "Take one with some layers")

    def with_widths(widths: Mapping[str, int]) -> OnnxGraph:
        return lower(graph, [narrowed(site, widths[site.id]) if site.id in widths else site for site in sites])

    return [
        ("the exact graph, nothing known", with_widths({})),
        ("the same again", with_widths({})),
        ("one block narrower: one new shape in two GEMMs", with_widths({blocks[0]: KNOWN})),
        ("known kernels arranged anew", with_widths({blocks[1]: KNOWN})),
        ("known kernels, two blocks", with_widths(dict.fromkeys(blocks[:2], KNOWN))),
        ("another width: one new shape in two GEMMs", with_widths({blocks[-1]: FRESH})),
    ]


def measure(graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], tune: bool, place: Path) -> list[Cost]:
    """Build every variant in one worker. Raises `ModelError` for a build that fails."""
    found = []
    with Worker("builder", 1) as builder:
        builder.call(f"{_HERE}:built", None, shapes, place, place, tune)
        for index, (name, variant) in enumerate(variants(graph)):
            begun = perf_counter()
            path = variant.save(place / f"{index}.onnx", 1 << 20)
            saved_s = perf_counter() - begun
            answer = builder.call(f"{_HERE}:built", path, shapes, place / str(index), place / "cache", tune)
            if isinstance(answer, WorkerFailure):
                raise ModelError(f"building {name!r} failed: {answer}", "See its output")
            found.append(Cost(name, saved_s, *answer))
    return found


def built(
    model: Path | None, shapes: Mapping[str, tuple[int, ...]], folder: Path, cache: Path, tune: bool
) -> tuple[float, float, int]:
    """In the worker: (seconds to build, seconds to load and run once, kernels compiled). No model: only imports."""
    from rewriter.runtimes.tvm.load import load as load_artifact
    from rewriter.runtimes.tvm.profile import drawn

    if model is None:
        return 0.0, 0.0, 0
    before, target = _kernels(cache), detect("cpu", 1)
    begun = perf_counter()
    artifact = TvmRuntime(cache, tune).build(load(model), shapes, folder, target)
    middle = perf_counter()
    executable = load_artifact(artifact)
    executable.run(drawn(executable, shapes))
    return middle - begun, perf_counter() - middle, _kernels(cache) - before


def _kernels(cache: Path) -> int:
    return sum(1 for _ in (cache / "code").glob("*.o")) if (cache / "code").is_dir() else 0


def table(runs: Sequence[Sequence[Cost]]) -> str:
    """Medians over the repetitions, as Markdown."""
    lines = [
        "| variant | kernels compiled | writing the graph | building | loading, first run | in all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for same in zip(*runs, strict=True):
        parts = [[getattr(cost, part) for cost in same] for part in ("saved_s", "built_s", "loaded_s")]
        saved_s, built_s, loaded_s = map(median, parts)
        lines.append(Cost(same[0].name, saved_s, built_s, loaded_s, same[0].kernels).row)
    return "\n".join(lines)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m rewriter.benchmark.variant_cost", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--tune", action="store_true", help="measure tiles of new shapes, as for a variant that is kept"
    )
    parsed = parser.parse_args()
    try:
        graph = load(parsed.model)
        shapes = {spec.name: (1, parsed.tokens) for spec in graph.inputs}
        runs = []
        for _ in range(parsed.repeat):
            with tempfile.TemporaryDirectory(prefix="variants-") as place:
                runs.append(measure(graph, shapes, parsed.tune, Path(place)))
    except UserError as error:
        sys.stderr.write(f"variant_cost: {error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{table(runs)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
