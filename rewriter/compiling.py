"""`optimize MODEL --compile-only`: build for a target without running anything on it, so it need not be here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.assembly.plan_file import restore
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.errors import ModelError
from rewriter.core.options import Options
from rewriter.core.progress import Listener, Progress, Silent
from rewriter.core.site import State
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.report.output import COMPILED, check_output, writing
from rewriter.runtimes import jobs
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.session import TVM, default_cache, scratch
from rewriter.search.workload import choose_workload

_LIMIT_S = 900.0
_MEMORY_BYTES = 16 * 2**30
_LIBRARY = "rewriter.runtimes.tvm.embedded.library:build_library"


@dataclass(frozen=True)
class Compiled:
    """What was written where; `report` is the content of ``compiled.json``."""

    folder: Path
    report: dict[str, Any]

    @property
    def summary(self) -> str:
        """Two lines for people."""
        files = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.report["files"].items())
        return (
            f"Compiled for {self.report['target']['name']}; nothing was run, so neither speed nor accuracy is known.\n"
            f"Written to {self.folder}: {files}"
        )


def compile_only(model: Path, options: Options, listener: Listener | None = None) -> Compiled:
    """Build the model, or the variant of ``--plan``, for ``--target``. Raises `UserError` for bad input."""
    target = detect(options.target, options.threads, away=True)
    folder = options.output or Path(f"{model.stem}-compiled")
    check_output(folder)
    progress = Progress(listener or Silent())
    progress.expect({"load": 2.0, "recognise": 15.0, "compile": 20.0})
    cache = options.cache_dir or default_cache()
    with scratch(cache) as place:
        with progress.stage("load", f"reading {model}"):
            graph = load(model)
            workload = choose_workload(graph, None, options.shapes, options.seed)
        with progress.stage("recognise", "finding attention and feed-forward blocks by what they compute"):
            written, plan = _variant(graph, dict(workload.feeds[0]), options)
        with progress.stage("compile", f"compiling for {target.name}"), writing(folder) as fresh:
            built = _build(written, workload.shapes, place, target, options, cache)
            for file in sorted(built.iterdir()):
                shutil.copyfile(file, fresh / file.name)
            report = _report(graph, target, workload.shapes, plan, fresh)
            (fresh / COMPILED).write_text(json.dumps(report, indent=2) + "\n")
    return Compiled(folder, report)


def _variant(graph: OnnxGraph, feeds: dict[str, Any], options: Options) -> tuple[OnnxGraph, str]:
    """The graph with composites in place of what was understood, as the plan changes it, and the plan as text."""
    sites = recognise(graph, feeds, options.seed).sites
    ready = [site for site in sites if site.state is State.LOWERABLE]
    if options.plan is None:
        return lower(graph, ready), ""
    plan, changed = restore(graph, sites, options.plan)
    return lower(graph, [changed.get(site.id, site) for site in ready]), str(plan)


def _build(
    graph: OnnxGraph,
    shapes: Mapping[str, tuple[int, ...]],
    place: Path,
    target: Target,
    options: Options,
    cache: Path,
) -> Path:
    saved = graph.save(place / "model.onnx")
    with Worker("build", 1, _MEMORY_BYTES) as worker:
        if options.emit == "static-library":
            arguments: tuple[Any, ...] = (saved, dict(shapes), place / "library", target)
            built = worker.call(_LIBRARY, *arguments, timeout_s=_LIMIT_S)
        else:
            arguments = (TVM, saved, dict(shapes), place / "build", target, cache / "compiled")
            built = worker.call(f"{jobs.__name__}:build", *arguments, timeout_s=_LIMIT_S)
    if isinstance(built, WorkerFailure):
        raise ModelError(f"compiling for {target.name} failed: {built}", "Check the target, or report the operator")
    return Path(built)


def _report(
    graph: OnnxGraph, target: Target, shapes: Mapping[str, tuple[int, ...]], plan: str, folder: Path
) -> dict[str, Any]:
    return {
        "compiled_only": True,
        "model": graph.fingerprint(),
        "plan": plan,
        "target": target.key(),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
