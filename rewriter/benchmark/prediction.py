"""``python -m rewriter.benchmark.prediction MODEL.onnx``: does what sub-blocks cost add up to what a model costs?

Random mixed plans (pruned heads, narrower feed-forwards, number formats, at each site something else) are predicted
from the cost table, as a search does: the time of the original less what each choice saves in its chain. Then every
plan is built and timed as a whole, all in turn in one process. Weights are cut without regard to quality. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from rewriter.attention.lower import fragment, lower
from rewriter.attention.recognise import recognise
from rewriter.calibration.data import draw_inputs
from rewriter.core.errors import ModelError, UserError
from rewriter.core.site import Site, State
from rewriter.core.store import Store
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.graph.ranges import integer_ranges
from rewriter.runtimes import jobs
from rewriter.runtimes.tvm.artifact import engine_key
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure, pinnable
from rewriter.search.candidates import all_candidates
from rewriter.search.cost import CostTable, Priced
from rewriter.search.problem import Options
from rewriter.search.selection import Selection, select_passes
from rewriter.search.session import TVM_UNTUNED
from rewriter.search.structure import blank_statistics, restructure

Feeds = dict[str, NDArray[Any]]
_TOGETHER = "rewriter.measurement.together:time_together"
_INLINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Predicted:
    """One plan: what it does, and seconds as predicted and as measured."""

    what: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured; negative for one that was too low."""
        return self.predicted_s / self.measured_s - 1.0


class Bench:
    """The model with the workers, the cache and the cost table that plans are priced and timed with."""

    def __init__(self, model: Path, tokens: int, cache: Path, scratch: Path, builder: Worker, timer: Worker) -> None:
        self.graph, self.target = load(model), detect("cpu", timer.threads)
        self.cache, self.scratch, self.builder, self.timer = cache, scratch, builder, timer
        recognition = recognise(self.graph)
        self.sites: dict[str, Site] = {s.id: s for s in recognition.sites if s.state is State.LOWERABLE}
        self.selection: Selection = select_passes(None, "any", self.target)
        self.choices = all_candidates(recognition, self.selection, self.target, "quick")
        sizes = {spec.name: (1, tokens) for spec in self.graph.inputs}
        self.feeds: Feeds = draw_inputs(self.graph.inputs, sizes, integer_ranges(self.graph), 0)
        key = {"target": self.target.key(), "engine": engine_key()}
        self.table = CostTable(Store(cache / "costs.jsonl"), key, self._build, self._time, scratch / "chains")

    def rewritten(self, site: str, options: Options) -> Site:
        """A site after options, its weights cut anyhow."""
        plain = self.sites[site]
        return restructure(plain, options, self.selection.passes, blank_statistics(plain))

    def prices(self, wanted: Sequence[tuple[str, Options]]) -> dict[tuple[str, Options], float]:
        """Seconds of each choice in a chain of copies."""
        sites = [self.rewritten(*one) for one in wanted]
        priced = [Priced(site, fragment(self.graph, site)) for site in sites]
        names = sorted({name for one in priced for name in one.piece.reads()})
        run = Interpreter(lower(self.graph, list(self.sites.values()))).run(self.feeds, taps=names)
        values = {name: run[name].numpy() for name in names}
        found = self.table.latencies_s(self.graph, priced, values)
        return {one: latency.median for one, latency in zip(wanted, found, strict=True)}

    def times(self, plans: Sequence[Mapping[str, Options]]) -> list[float]:
        """Median seconds of whole models, run in turn."""
        np.savez(self.scratch / "feeds.npz", **self.feeds)  # type: ignore[arg-type]
        shapes = {name: array.shape for name, array in self.feeds.items()}
        artifacts = []
        for number, plan in enumerate(plans):
            sites = [self.rewritten(site, options) for site, options in plan.items()]
            artifacts.append(self._build(lower(self.graph, sites), shapes, f"plan-{number}"))
        samples = self._time(artifacts, [self.scratch / "feeds.npz"] * len(plans))
        return [float(np.median(values)) for values in samples]

    def _build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], name: str) -> Path:
        saved = graph.save(self.scratch / f"{name}.onnx", _INLINE_BYTES)
        arguments = (TVM_UNTUNED, saved, dict(shapes), self.scratch / "builds" / name, self.target, self.cache)
        built = self.builder.call(f"{jobs.__name__}:build", *arguments, timeout_s=120.0)
        if isinstance(built, WorkerFailure):
            raise ModelError(f"building {name} failed: {built}", "See its output")
        return Path(built)

    def _time(self, artifacts: Sequence[Path], feeds: Sequence[Path]) -> list[list[float]]:
        paths = [str(path) for path in artifacts], [str(path) for path in feeds]
        found = self.timer.call(_TOGETHER, TVM_UNTUNED, *paths, self.timer.threads, 40, timeout_s=300.0)
        if isinstance(found, WorkerFailure):
            raise ModelError(f"timing failed: {found}", "Run it again")
        return [list(values) for values in found]


def draw(choices: Mapping[str, Sequence[Options]], count: int, seed: int) -> list[dict[str, Options]]:
    """Plans that pick at random at every site, with a chance of their own to leave a site alone."""
    rng, plans = np.random.default_rng(seed), []
    for _ in range(count):
        alone = rng.uniform(0.0, 0.8)
        plans.append({
            site: () if rng.random() < alone else offered[int(rng.integers(len(offered)))]
            for site, offered in choices.items()
        })  # fmt: skip
    return plans


def measure(bench: Bench, count: int, seed: int) -> list[Predicted]:
    """Predict and time `count` plans."""
    nothing: dict[str, Options] = dict.fromkeys(bench.choices, ())
    plans = [nothing, *draw(bench.choices, count, seed)]
    wanted = list(dict.fromkeys((site, options) for plan in plans for site, options in plan.items()))
    price, measured = bench.prices(wanted), bench.times(plans)
    saved = [sum(price[site, ()] - price[site, options] for site, options in plan.items()) for plan in plans]
    rows = zip(plans[1:], saved[1:], measured[1:], strict=True)
    return [Predicted(_told(plan), measured[0] - gain, seconds) for plan, gain, seconds in rows]


def _told(plan: Mapping[str, Options]) -> str:
    names: dict[str, int] = {}
    for options in plan.values():
        for option in options:
            names[option.name] = names.get(option.name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "nothing"


def table(rows: Sequence[Predicted]) -> str:
    """Markdown, and what it comes to."""
    errors = np.array([abs(row.error) for row in rows])
    predicted, measured = ([getattr(row, part) for row in rows] for part in ("predicted_s", "measured_s"))
    rank = float(spearmanr(predicted, measured).statistic)
    lines = ["| plan | predicted | measured | error |", "| --- | --- | --- | --- |"]
    for row in rows:
        figures = f"{1e3 * row.predicted_s:.2f} ms | {1e3 * row.measured_s:.2f} ms | {100 * row.error:+.1f} %"
        lines.append(f"| {row.what} | {figures} |")
    bias = float(np.median([row.error for row in rows]))
    lines += [
        "",
        f"Median error {100 * np.median(errors):.1f} % (signed {100 * bias:+.1f} %), "
        f"largest {100 * errors.max():.1f} %, Spearman {rank:.3f}, {len(rows)} plans.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m rewriter.benchmark.prediction", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder that keeps kernels and costs for another run")
    parsed = parser.parse_args()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="prediction-") as place,
            Worker("builder", 1) as builder,
            Worker("timer", parsed.threads, cores=pinnable(parsed.threads)) as timer,
        ):
            cache = parsed.cache or Path(place) / "cache"
            bench = Bench(parsed.model, parsed.tokens, cache, Path(place), builder, timer)
            rows = measure(bench, parsed.plans, parsed.seed)
    except UserError as error:
        sys.stderr.write(f"prediction: {error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
