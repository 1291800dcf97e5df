"""Serving requests of all lengths: which sizes the artifact is built for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.core.errors import ModelError, UserError
from rewriter.core.lengths import Size
from rewriter.core.options import Effort
from rewriter.graph.onnx import OnnxGraph
from rewriter.measurement.bench import save_feeds
from rewriter.measurement.race import RaceResult
from rewriter.runtimes.retry import call_twice
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search.buckets import Curve, choose, expected_s, probes, serving
from rewriter.search.caches import fitted_shapes
from rewriter.search.decision import Outcome
from rewriter.search.padding import Outputs, name_outputs, shapes_at
from rewriter.search.session import Session
from rewriter.search.traffic import Traffic

Shapes = Mapping[str, tuple[int, ...]]

_PROBES: Mapping[Effort, int] = {"quick": 3, "normal": 4, "thorough": 7}
_TIMING_S: Mapping[Effort, float] = {"quick": 1.5, "normal": 5.0, "thorough": 20.0}
_BUILD_LIMIT_S = 900.0
_SEARCH_LIMIT_S = 3600.0
_TIMING_LIMIT_S = 300.0
_MOST_ROUNDS = 3  # of choosing, measuring what was chosen, and choosing again


@dataclass(frozen=True)
class Served:
    """What the artifact is built for, and why.

    `curve` holds the measured sizes (None: nothing was timed), `choice_s` how long all that took. `exact`: only
    these very sizes run, because padding would change the answers. `race`: passes over `sampled` requests, by subject.
    """

    traffic: Traffic
    sizes: tuple[Size, ...]
    artifact: Path | None
    curve: Curve | None = None
    choice_s: float = 0.0
    exact: bool = False
    race: RaceResult | None = None
    sampled: int = 0

    @property
    def expected_s(self) -> float | None:
        """Mean seconds of a request in these sizes, by the curve."""
        known = self.curve is not None and not self.exact
        return expected_s(self.traffic.requests, self.sizes, self.curve) if known and self.curve is not None else None


def serve_lengths(session: Session, outcome: Outcome) -> Served | None:
    """Choose the sizes and build what was kept for them; None without known lengths.

    What cannot be built or timed becomes a note: the artifact then has the one size that was optimised for.
    """
    traffic = session.traffic
    if traffic is None:
        return None
    several = len(traffic.requests.counts) > 1 or traffic.requests.room > traffic.requests.quantile(1.0)
    if not traffic.asked and not (several and worth_padding(session, outcome, traffic)):
        return None
    what = f"choosing the sizes to build for, by {traffic.requests.source}"
    with session.progress.stage("lengths", what):
        try:
            served = _exactly(session, outcome, traffic) if traffic.harm else _padded(session, outcome, traffic)
            session.progress.advance(1.0, sentence(served))
        except UserError as problem:
            session.notes.append(f"model.so was not built for {traffic.requests.source}: {problem}")
            served = Served(traffic, (), None)
        return served


def worth_padding(session: Session, outcome: Outcome, traffic: Traffic) -> bool:
    """Whether sizes can be chosen where nobody asked for them; a note where not."""
    if traffic.harm:
        session.notes.append(f"model.so has one size, because padding is not harmless: {traffic.harm}")
    elif outcome.kept.caches:
        session.notes.append("model.so has one size, because the caches of what is kept have sizes of their own")
    return not traffic.harm and not outcome.kept.caches


def sentence(served: Served) -> str:
    """Which sizes and how many of the requests each serves."""
    shares = shares_served(served)
    plain = all(batch == 1 for batch, _ in served.sizes)
    parts = [f"{tokens if plain else f'{batch}x{tokens}'} ({100 * shares[batch, tokens]:.0f} %)"
             for batch, tokens in served.sizes]  # fmt: skip
    return f"sizes {', '.join(parts)} of {served.traffic.requests.source}"


def shares_served(served: Served) -> dict[Size, float]:
    """The share of requests by the size that serves them."""
    found = dict.fromkeys(served.sizes, 0.0)
    for request, share in served.traffic.requests.shares().items():
        size = (request if request in found else None) if served.exact else serving(served.sizes, request)
        if size is not None:
            found[size] += share
    return found


def _padded(session: Session, outcome: Outcome, traffic: Traffic) -> Served:
    """Sizes with the least expected time: measured at a few, chosen, measured again where that chose others.

    While choosing, kernels have default tiles, as everything has that is only priced; what is chosen is then tuned.
    """
    requests, options, graph = traffic.requests, session.options, outcome.kept.graph
    wanted = probes(requests, _PROBES[options.effort])
    begun_s = time.monotonic()
    curve = Curve(_timed(session, build_sizes(session, graph, wanted, "sizes-0", session.pricing_engine), wanted))
    for number in range(1, _MOST_ROUNDS):
        chosen = choose(requests, curve, options.buckets)
        session.progress.advance(0.2 * number)
        if set(chosen.sizes) <= set(curve.measured_s):
            break
        wanted = sorted({*wanted, *chosen.sizes})
        artifact = build_sizes(session, graph, wanted, f"sizes-{number}", session.pricing_engine)
        curve = Curve(_timed(session, artifact, wanted))
    sizes = choose(requests, curve, options.buckets).sizes
    artifact = build_sizes(session, graph, sizes, "served", session.engine)
    if session.engine != session.pricing_engine:
        curve = _tuned(curve, _timed(session, artifact, sizes))
    return Served(traffic, sizes, artifact, curve, time.monotonic() - begun_s)


def _tuned(curve: Curve, tuned_s: Mapping[Size, float]) -> Curve:
    """The curve where tuning moved it: as measured at the sizes built, elsewhere by as much as it moved on average."""
    moved = float(np.median([seconds / curve(size) for size, seconds in tuned_s.items()]))
    return Curve({**{size: moved * seconds for size, seconds in curve.measured_s.items()}, **tuned_s})


def _exactly(session: Session, outcome: Outcome, traffic: Traffic) -> Served:
    """The most frequent sizes as they are; nothing else will run."""
    count = session.options.buckets or 8
    counts = traffic.requests.counts
    sizes = tuple(sorted(sorted(counts, key=lambda size: (-counts[size], size))[:count]))
    begun_s = time.monotonic()
    artifact = build_sizes(session, outcome.kept.graph, sizes, "served", session.engine)
    session.notes.append(f"only the sizes built for will run, because padding is not harmless: {traffic.harm}")
    return Served(traffic, sizes, artifact, None, time.monotonic() - begun_s, exact=True)


def build_sizes(session: Session, graph: OnnxGraph, sizes: Sequence[Size], name: str, engine: str) -> Path:
    """An artifact for these sizes; requests between are padded where that is harmless. Raises `UserError`."""
    traffic = session.traffic
    assert traffic is not None
    shapes = [shapes_at(graph.inputs, session.workload.shapes, traffic.axes, size) for size in sizes]
    return build_artifact(session, graph, shapes, not traffic.harm, name, engine)


def build_artifact(
    session: Session, graph: OnnxGraph, shapes: Sequence[Shapes], padding: bool, name: str, engine: str
) -> Path:
    """An artifact for several sets of shapes, in the guarded worker. Raises `UserError` when that fails."""
    saved = graph.save(session.folder / f"{name}.onnx")
    outputs = session.traffic.outputs if session.traffic is not None else {}
    pad = {spec.name: 0.0 for spec in graph.inputs} if padding else {}
    wanted = [fitted_shapes(one, graph.inputs) for one in shapes]
    arguments = (engine, saved, wanted, session.folder / name, session.target, pad, session.cache / "compiled", outputs)
    limit_s = _SEARCH_LIMIT_S if session.options.tuner == "metaschedule" else _BUILD_LIMIT_S
    spec = f"{__name__}:build_in_worker"
    built = call_twice(session.builder, spec, *arguments, timeout_s=limit_s, told=session.notes.append)
    if isinstance(built, WorkerFailure):
        raise ModelError(f"the TVM build failed: {built}", "model.onnx runs in ONNX Runtime all the same")
    return Path(built)


def build_in_worker(
    runtime: str,
    model: Path,
    shapes: Sequence[Shapes],
    folder: Path,
    target: Any,
    pad: Mapping[str, float],
    cache: Path,
    outputs: Outputs,
) -> Path:
    """In the worker: one artifact for several sets of shapes, its outputs' axes named as found."""
    from rewriter.graph.onnx import load
    from rewriter.runtimes.base import of_spec
    from rewriter.runtimes.tvm.runtime import TvmRuntime

    engine = of_spec(runtime)
    assert isinstance(engine, TvmRuntime)
    engine.cache = cache
    graph = load(model)
    name_outputs(graph, outputs)
    return engine.build_buckets(graph, shapes, folder, target, pad)


def _timed(session: Session, artifact: Path, sizes: Sequence[Size]) -> dict[Size, float]:
    """Seconds of one run at each size, all in turn in one process."""
    assert session.traffic is not None
    make, effort = session.traffic.make, session.options.effort
    feeds = save_feeds([make(*size, index) for index, size in enumerate(sizes)], session.folder / "sized")
    spec = "rewriter.measurement.together:time_together"
    paths = ([str(artifact)] * len(sizes), [str(path) for path in feeds])
    arguments = (session.engine, *paths, session.target.threads, 60, _TIMING_S[effort], session.options.seed)
    found = call_twice(session.timer, spec, *arguments, timeout_s=_TIMING_LIMIT_S, told=session.notes.append)
    if isinstance(found, WorkerFailure):
        raise ModelError(f"timing it at several sizes failed: {found}", "See optimize.log")
    session.variants_timed += len(sizes)
    return {size: float(np.median(runs)) for size, runs in zip(sizes, found, strict=True)}
