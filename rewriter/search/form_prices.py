"""What a sub-block costs in ONNX Runtime, form by form: the cost table, filled by another engine than TVM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rewriter.core.store import Store
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.onnxruntime import version
from rewriter.runtimes.shapes import dtype_of, sizes_of
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search.cost import CostTable
from rewriter.search.session import ONNXRUNTIME, Session

TOGETHER = "rewriter.measurement.together:time_together"
_LIMIT_S = 300.0


def onnxruntime_table(session: Session) -> CostTable:
    """The cost table of ONNX Runtime on this machine, kept in the cache directory."""

    def build(graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], name: str) -> Path:
        return session.build(with_typed_outputs(graph), name, ONNXRUNTIME, shapes)

    def time_all(artifacts: Sequence[Path], feeds: Sequence[Path]) -> list[list[float]]:
        found = timed(session, artifacts, feeds, budget_s=20.0)
        return [[] for _ in artifacts] if found is None else found

    key: dict[str, Any] = {"target": session.target.key(), "engine": {"onnxruntime": version()}}
    return CostTable(Store(session.cache / "costs.jsonl"), key, build, time_all, session.folder / "chains")


def with_typed_outputs(graph: OnnxGraph) -> OnnxGraph:
    """The graph of a chain, whose outputs nobody declared, as standard ONNX wants it."""
    for value in graph.model.graph.outputs:
        sizes = sizes_of(value, 3)
        value.type = value.type or ir.TensorType(ir.DataType.from_numpy(dtype_of(value)))
        value.shape = value.shape or ir.Shape([None] * len(sizes))
    return graph


def timed(
    session: Session, artifacts: Sequence[Path], feeds: Sequence[Path], budget_s: float
) -> list[list[float]] | None:
    """Seconds of each run, artifacts in turn in one worker; None with a note if they could not be timed."""
    paths = ([str(path) for path in artifacts], [str(path) for path in feeds])
    arguments = (ONNXRUNTIME, *paths, session.target.threads, 40, budget_s)
    answer = session.timer.call(TOGETHER, *arguments, timeout_s=_LIMIT_S)
    if isinstance(answer, WorkerFailure):
        session.notes.append(f"forms of attention could not be timed: {answer}")
        return None
    return list(answer)
