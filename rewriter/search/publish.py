"""Writing what was kept: the folder appears whole, with everything needed to run it, repeat it and understand it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewriter.assembly.plan_file import save_plan
from rewriter.core.errors import ModelError, UserError
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph, TensorSpec
from rewriter.report.markdown import markdown
from rewriter.report.output import check_room, writing
from rewriter.runtimes.standard import to_standard
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search.decision import Outcome
from rewriter.search.report import build_report
from rewriter.search.session import Session

logger = logging.getLogger("rewriter")

_CARRIED = (".json", ".txt", ".model", ".jinja", ".md", ".py")
_NEVER_CARRIED = {"report.json", "plan.json", "model.json", "report.md"}
_BUCKET_STEP = 32
_BUILD_LIMIT_S = 600.0
_SEARCH_LIMIT_S = 3600.0


def publish(session: Session, outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Write the output folder and return the report. Raises `OutputError` without room or the right to write."""
    size = sum(value.const_value.nbytes for value in session.graph.constants.values() if value.const_value is not None)
    check_room(folder, 3 * size + 10_000_000)
    with session.progress.stage("write", f"writing {folder}"), writing(folder) as place:
        _write_model(session, outcome, place)
        _write_build(session, outcome, place)
        save_plan(place, session.graph, outcome.kept.plan, session.recognition.sites, outcome.kept.sites.values())
        _carry_files(session.graph, place)
        _write_reports(session, outcome, folder, place)
    return json.loads((folder / "report.json").read_text())


def _write_reports(session: Session, outcome: Outcome, folder: Path, place: Path) -> None:
    report = build_report(session, outcome) | {"output": str(folder)}
    (place / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (place / "report.md").write_text(markdown(report))
    if session.log is not None and session.log.exists():
        for handler in logger.handlers:
            handler.flush()
        shutil.copyfile(session.log, place / "optimize.log")


def _write_model(session: Session, outcome: Outcome, place: Path) -> None:
    """The kept graph in standard operators at the input's opset; the untouched model when the original won."""
    graph = session.graph.clone() if outcome.kept_original else to_standard(outcome.kept.graph)
    graph.model.metadata_props.update({
        "rewriter.plan": str(outcome.kept.plan),
        "rewriter.source": session.graph.fingerprint(),
        "rewriter.version": _version(),
    })  # fmt: skip
    graph.save(place / "model.onnx")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("attention-rewriter")
    except PackageNotFoundError:
        return "unknown"


def buckets(session: Session) -> tuple[list[dict[str, tuple[int, ...]]], dict[str, float]]:
    """Shapes to build for, and the values to pad with.

    Where padding was shown to be harmless, the lengths of the data between the timed one and a quarter of it get
    buckets of their own, and anything between is padded up; else only the timed shape is built.
    """
    shapes = dict(session.workload.shapes)
    axis = session.padded_axis
    if axis is None:
        return [shapes], {}
    longest = max(size for name, size in _sizes(session.graph, shapes).items() if name == axis)
    lengths = sorted({-(-longest * part // 4 // _BUCKET_STEP) * _BUCKET_STEP for part in (1, 2)} | {longest})
    fitting = [length for length in lengths if 0 < length <= longest]

    def at(spec: TensorSpec, length: int) -> tuple[int, ...]:
        sized = zip(spec.shape, shapes[spec.name], strict=True)
        return tuple(length if label == axis else size for label, size in sized)

    made = [{spec.name: at(spec, length) for spec in session.graph.inputs} for length in fitting]
    return made, {spec.name: 0.0 for spec in session.graph.inputs}


def _sizes(graph: OnnxGraph, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {
        label: size
        for spec in graph.inputs
        for label, size in zip(spec.shape, shapes[spec.name], strict=True)
        if isinstance(label, str)
    }


def _write_build(session: Session, outcome: Outcome, place: Path) -> None:
    """The TVM build of the kept variant for all buckets; a note instead when TVM cannot build it."""
    try:
        built = _build(session, outcome)
    except UserError as problem:
        session.notes.append(f"model.so was not written: {problem}")
        return
    for file in built.iterdir():
        shutil.copyfile(file, place / file.name)


def _build(session: Session, outcome: Outcome) -> Path:
    shapes, pad = buckets(session)
    saved = outcome.kept.graph.save(session.folder / "kept.onnx")
    spec, target = f"{__name__}:build_buckets", session.target
    searching = session.options.tuner == "metaschedule" and not target.elsewhere
    arguments = (saved, shapes, session.folder / "kept", target, pad, session.cache / "compiled", searching)
    built = session.builder.call(spec, *arguments, timeout_s=_SEARCH_LIMIT_S if searching else _BUILD_LIMIT_S)
    if isinstance(built, WorkerFailure):
        raise ModelError(f"the TVM build failed: {built}", "model.onnx runs in ONNX Runtime all the same")
    return Path(built)


def build_buckets(
    model: Path,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    folder: Path,
    target: Target,
    pad: Mapping[str, float],
    cache: Path,
    searching: bool = False,
) -> Path:
    """In the worker: one artifact for several shapes; `searching` lets MetaSchedule serve what has no template."""
    from rewriter.graph.onnx import load
    from rewriter.runtimes.tvm.compile import build

    polish = None
    if searching:
        from rewriter.runtimes.tvm.database import TuningDatabase
        from rewriter.runtimes.tvm.metaschedule import MetaScheduler

        polish = MetaScheduler(target, TuningDatabase(cache / "tuning.jsonl")).polish
    return build(load(model), shapes, folder, target, cache / "code", pad=pad, polish=polish)


def _carry_files(graph: OnnxGraph, place: Path) -> None:
    """Config and tokenizer files that lie beside the model, so that the usual loaders accept the folder."""
    source = graph.path.parent if graph.path is not None else None
    if source is None or not (source / "config.json").is_file():
        return
    for file in sorted(source.iterdir()):
        small = file.is_file() and file.suffix in _CARRIED and file.stat().st_size < 50_000_000
        if small and file.name not in _NEVER_CARRIED:
            shutil.copyfile(file, place / file.name)
