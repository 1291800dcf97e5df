"""`optimize verify`: does a folder hold what its report says, and does it still match the original?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.metrics import choose_metric
from rewriter.calibration.data import draw_inputs, load_data
from rewriter.core.errors import ModelError, UserError
from rewriter.core.options import MaxDrop
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.graph.ranges import integer_ranges
from rewriter.report.output import TVM, kept_runtime

Feeds = dict[str, NDArray[Any]]

_SAMPLES = 256
_FEWEST = 8  # samples below which a metric says nothing
# Of the largest output. fp32 kernels sum in another order than the model's own operators; where products are rounded to
# fewer bits, a sum that differs in the last place may round the other way, and that spreads through the layers.
_TVM_TOLERANCE, _ROUNDED_TOLERANCE = 1e-3, 0.1


def verify(folder: Path, against: Path, data: Path | None = None) -> dict[str, Any]:
    """``{"ok": bool, "checks": [{"check", "ok", "detail"}]}``. Raises `ModelError` if the folder is not one of ours."""
    report_file = folder / "report.json"
    if not report_file.is_file():
        raise ModelError(f"{folder} has no report.json", "Name a folder that `optimize -o` wrote")
    try:
        report = json.loads(report_file.read_text())
    except ValueError as error:
        raise ModelError(f"{report_file} is damaged: {error}", "Run optimize again") from None
    original, best = load(against), load(folder / "model.onnx")
    checks = [
        _identity(original, report),
        _interface(original, best),
        _shared_library(folder),
        *_outputs(original, best, folder, report, data),
    ]
    return {"ok": all(check["ok"] for check in checks), "checks": checks}


def _check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"check": name, "ok": bool(ok), "detail": detail}


def _identity(original: OnnxGraph, report: dict[str, Any]) -> dict[str, Any]:
    same = original.fingerprint() == report["model"]["fingerprint"]
    return _check("original", same, "the model the report was made for" if same else "another model than in the report")


def _interface(original: OnnxGraph, best: OnnxGraph) -> dict[str, Any]:
    before, after = (tuple(map(str, (*g.inputs, *g.outputs))) for g in (original, best))
    detail = "same names, dtypes and shapes" if before == after else f"{before} became {after}"
    return _check("inputs and outputs", before == after, detail)


def _shared_library(folder: Path) -> dict[str, Any]:
    if not (folder / "model.json").is_file():
        return _check("TVM build", True, "there is none in this folder")
    from rewriter.runtimes.tvm.artifact import read_manifest

    try:
        read_manifest(folder)
    except ModelError as problem:
        return _check("TVM build", False, str(problem))
    return _check("TVM build", True, "complete, unaltered, made for this processor and this TVM")


def _outputs(
    original: OnnxGraph, best: OnnxGraph, folder: Path, report: dict[str, Any], data: Path | None
) -> Iterator[dict[str, Any]]:
    """Compare outputs on data (or drawn inputs): the metric for the ONNX file, agreement of the TVM build with it."""
    inputs, labels = _inputs(original, report, data)
    wanted, found = (_run(graph, inputs) for graph in (original, best))
    if report["metric"] is None or data is None:
        worst = _difference(wanted, found)
        exact = report["metric"] is None
        limit = 1e-3 if exact else float("inf")
        yield _check("model.onnx", worst <= limit, f"largest relative difference {worst:.1e} from the original")
    else:
        metric = choose_metric(report["metric"]["name"], wanted, labels)
        drop = metric.paired(wanted, found, labels).drop
        allowed = MaxDrop.parse(report["metric"]["max_drop"])
        ok = drop <= allowed.fraction
        yield _check(
            "model.onnx",
            ok,
            f"{metric.name} drop {100 * drop:.3f} points on {_rows(inputs)} samples, {allowed} allowed",
        )
    if (folder / "model.so").is_file():
        from rewriter.runtimes.tvm.load import load as load_artifact

        first = {name: array[:1] for name, array in inputs.items()}
        worst = _difference(_run(best, first), load_artifact(folder).run(first))
        limit = _ROUNDED_TOLERANCE if _rounded(report) else _TVM_TOLERANCE
        yield _check("model.so", worst <= limit, f"largest relative difference {worst:.1e} from model.onnx")
    if kept_runtime(folder) not in (TVM, "onnxruntime"):
        yield _kept_artifact(folder, report, inputs, labels, wanted, found)


def _kept_artifact(
    folder: Path, report: dict[str, Any], inputs: Feeds, labels: NDArray[np.int64] | None, wanted: Feeds, found: Feeds
) -> dict[str, Any]:
    """The artifact of a runtime besides TVM and ONNX Runtime, as it is served: one sample at a time.

    One that rounds is measured by the metric where there is one and data for it, like a rewrite.
    """
    from rewriter.search.engines import BY_KEY
    from rewriter.search.shipped import load_kept

    runtime = kept_runtime(folder)
    try:
        artifact = load_kept(folder, runtime)
        rows = [artifact.run({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(_rows(inputs))]
    except UserError as problem:
        return _check(runtime, False, str(problem))
    served = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    worst = _difference(found, served)
    detail = f"largest relative difference {worst:.1e} from model.onnx"
    if not BY_KEY[runtime].rounds:
        return _check(runtime, worst <= _ROUNDED_TOLERANCE if _rounded(report) else worst <= _TVM_TOLERANCE, detail)
    if report["metric"] is None or _rows(inputs) < _FEWEST:
        return _check(runtime, worst < float("inf"), f"{detail}; only --data says what its rounding costs")
    metric = choose_metric(report["metric"]["name"], wanted, labels)
    drop, allowed = metric.paired(wanted, served, labels).drop, MaxDrop.parse(report["metric"]["max_drop"])
    said = f"{metric.name} drop {100 * drop:.3f} points on {_rows(inputs)} samples, {allowed} allowed"
    return _check(runtime, drop <= allowed.fraction, said)


def _rounded(report: dict[str, Any]) -> bool:
    return any(option.startswith("precision") for option in report["best"]["plan"])


def _inputs(original: OnnxGraph, report: dict[str, Any], data: Path | None) -> tuple[Feeds, NDArray[np.int64] | None]:
    if data is None:
        shapes = {name: tuple(shape) for name, shape in report["shapes"].items()}
        return draw_inputs(original.inputs, shapes, integer_ranges(original)), None
    dataset = load_data(data, original.inputs)
    rows = np.random.default_rng(0).permutation(len(dataset))[:_SAMPLES]
    subset = dataset.subset(rows)
    return dict(subset.inputs), subset.labels


def _run(graph: OnnxGraph, inputs: Feeds) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in Interpreter(graph).run(inputs).items()}


def _difference(wanted: dict[str, NDArray[Any]], found: dict[str, NDArray[Any]]) -> float:
    worst = 0.0
    for name, array in wanted.items():
        other = found[name]
        if array.shape != other.shape or not np.array_equal(np.isfinite(array), np.isfinite(other)):
            return float("inf")
        if array.dtype.kind == "f" and array.size:
            scale = max(float(np.abs(np.nan_to_num(array)).max()), 1e-12)
            worst = max(worst, float(np.abs(np.nan_to_num(array) - np.nan_to_num(other)).max()) / scale)
    return worst


def _rows(inputs: Feeds) -> int:
    return len(next(iter(inputs.values())))
