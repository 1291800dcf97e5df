"""The race behind ``make bench``: original and best under TVM and ONNX Runtime, in one interleaved measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.calibration.data import load_data
from rewriter.core.errors import ModelError
from rewriter.core.measurement import speedup
from rewriter.core.site import State
from rewriter.graph.onnx import load
from rewriter.measurement.bench import Subject, save_feeds
from rewriter.measurement.race import RaceResult, Rules, race
from rewriter.report.markdown import latency, ratio
from rewriter.runtimes import jobs
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.session import ONNXRUNTIME, ONNXRUNTIME_INT8, TVM
from rewriter.search.workload import choose_workload


@dataclass(frozen=True)
class Entrant:
    """One row of the table: a model file in a runtime."""

    name: str
    runtime: str
    model: Path


def race_table(
    folder: Path, scratch: Path, shapes: Mapping[str, tuple[int, ...]], threads: int, budget_s: float
) -> tuple[str, RaceResult]:
    """Build every entrant, race them, and return the table as Markdown. Raises `UserError` for an unusable folder."""
    models = sorted(folder.glob("*.onnx"))
    if len(models) != 1:
        raise ModelError(
            f"{folder} holds {len(models)} ONNX files, one is needed", "Run python -m models minilm -o FOLDER"
        )
    graph = load(models[0])
    data = load_data(folder / "data.npz", graph.inputs) if (folder / "data.npz").exists() else None
    workload = choose_workload(graph, data, shapes)
    target = detect("cpu", threads)
    lowerable = [site for site in recognise(graph).sites if site.state is State.LOWERABLE]
    exact = lower(graph, lowerable).save(scratch / "exact.onnx")
    entrants = [
        Entrant("ONNX Runtime fp32, original", ONNXRUNTIME, models[0]),
        Entrant("ONNX Runtime dynamic int8, original", ONNXRUNTIME_INT8, models[0]),
        Entrant("TVM fp32, original", TVM, exact),
    ]
    subjects, failures = [], {}
    feeds = save_feeds(workload.feeds, scratch / "feeds")
    with Worker("builder", 1) as builder:
        for number, entrant in enumerate(entrants):
            place = scratch / f"build{number}"
            built = builder.call(
                f"{jobs.__name__}:build", entrant.runtime, entrant.model, dict(workload.shapes), place, target
            )
            if isinstance(built, WorkerFailure):
                failures[entrant.name] = built
            else:
                subjects.append(Subject(entrant.name, entrant.runtime, Path(built), feeds))
    best = folder / "optimized"
    if (best / "model.so").exists():
        subjects.append(Subject("TVM, best", TVM, best, feeds))
    if (best / "model.onnx").exists():
        subjects.append(Subject("ONNX Runtime, best", ONNXRUNTIME, best / "model.onnx", feeds))
    result = race(subjects, threads=threads, rules=Rules(budget_s=budget_s, most_rounds=200))
    sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in workload.shapes.items())
    lines = [f"{models[0].name}, {sizes}, {threads} thread(s), one process per runtime, blocks in turn", ""]
    lines += _rows(subjects, result)
    lines += [f"{name} failed: {failure}" for name, failure in {**failures, **result.failures}.items()]
    environment = next(iter(result.values())).environment if result else {}
    lines += ["", *[f"- {name}: {value}" for name, value in environment.items()]]
    return "\n".join(lines), result


def _rows(subjects: list[Subject], result: RaceResult) -> list[str]:
    columns = [subject.name for subject in subjects if subject.name in result]
    lines = ["| | latency | " + " | ".join(f"against {name}" for name in columns) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(columns))
    for name in columns:
        ratios = ["" if other == name else ratio(speedup(result[other], result[name]).as_dict()) for other in columns]
        lines.append(f"| {name} | {latency(result[name].latency_s().as_dict())} | " + " | ".join(ratios) + " |")
    return lines
