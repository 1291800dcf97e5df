"""Writing what was kept: the folder appears whole, with everything needed to run it, repeat it and understand it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from rewriter.assembly.plan_file import save_plan
from rewriter.assembly.several_graphs import DECODER_FILES, rewritten
from rewriter.core.errors import UserError
from rewriter.graph.onnx import OnnxGraph
from rewriter.report.markdown import markdown
from rewriter.report.output import check_room, writing
from rewriter.runtimes.standard import AS_CHOSEN, to_standard
from rewriter.search.decision import Outcome
from rewriter.search.forms_report import written_otherwise
from rewriter.search.lengths import Served, build_artifact
from rewriter.search.report import build_report
from rewriter.search.session import Session
from rewriter.search.shipped import ship

logger = logging.getLogger("rewriter")

_CARRIED = (".json", ".txt", ".model", ".jinja", ".md", ".py")
_NEVER_CARRIED = {"report.json", "plan.json", "model.json", "report.md"}
REMOTE = "remote.json"


def publish(session: Session, outcome: Outcome, folder: Path, served: Served | None = None) -> dict[str, Any]:
    """Write the output folder and return the report. Raises `OutputError` without room or the right to write.

    `served` is what was built for the lengths of requests; without it the artifact has the shape that was timed.
    """
    size = sum(value.const_value.nbytes for value in session.graph.constants.values() if value.const_value is not None)
    check_room(folder, 3 * size + 10_000_000)
    with session.progress.stage("write", f"writing {folder}"), writing(folder) as place:
        _write_model(session, outcome, place)
        _write_build(session, outcome, served, place)
        ship(outcome, place)
        save_plan(place, session.graph, outcome.kept.plan, session.recognition.sites, outcome.kept.sites.values())
        _carry_files(session.graph, place)
        _write_reports(session, outcome, served, folder, place)
    return json.loads((folder / "report.json").read_text())


def _write_reports(session: Session, outcome: Outcome, served: Served | None, folder: Path, place: Path) -> None:
    report = build_report(session, outcome, served) | {"output": str(folder)}
    (place / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (place / "report.md").write_text(markdown(report))
    if session.log is not None and session.log.exists():
        for handler in logger.handlers:
            handler.flush()
        shutil.copyfile(session.log, place / "optimize.log")


def _write_model(session: Session, outcome: Outcome, place: Path) -> None:
    """The kept graph in standard operators at the input's opset; the untouched model when the original won."""
    graph = session.graph.clone() if outcome.kept_original else to_standard(outcome.kept.graph, AS_CHOSEN)
    session.notes += written_otherwise(session.graph, graph)
    graph.model.metadata_props.update({
        "rewriter.plan": str(outcome.kept.plan),
        "rewriter.source": session.graph.fingerprint(),
        "rewriter.version": _version(),
    })  # fmt: skip
    graph.save(place / "model.onnx")
    for sibling in session.siblings:
        rewritten(sibling, session.recognition.sites, outcome.kept.sites).save(place / sibling.file)
    own = session.graph.path
    if own is not None and own.name in DECODER_FILES and not (place / own.name).exists() and session.siblings:
        graph.save(place / own.name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("attention-rewriter")
    except PackageNotFoundError:
        return "unknown"


def _write_build(session: Session, outcome: Outcome, served: Served | None, place: Path) -> None:
    """The TVM build of the kept variant for all its sizes; a note instead when TVM cannot build it."""
    built = served.artifact if served is not None else None
    try:
        if built is None:
            padding = session.traffic is not None and not session.traffic.harm
            shapes = [session.workload.shapes]
            built = build_artifact(session, outcome.kept.graph, shapes, padding, "kept", session.engine)
    except UserError as problem:
        session.notes.append(f"model.so was not written: {problem}")
        return
    for file in built.iterdir():
        # Where it was timed is no part of what runs anywhere.
        if file.name != REMOTE:
            shutil.copyfile(file, place / file.name)


def _carry_files(graph: OnnxGraph, place: Path) -> None:
    """Config and tokenizer files that lie beside the model, so that the usual loaders accept the folder."""
    source = graph.path.parent if graph.path is not None else None
    if source is None or not (source / "config.json").is_file():
        return
    for file in sorted(source.iterdir()):
        small = file.is_file() and file.suffix in _CARRIED and file.stat().st_size < 50_000_000
        if small and file.name not in _NEVER_CARRIED:
            shutil.copyfile(file, place / file.name)
