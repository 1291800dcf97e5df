"""Whether TVM runs what was recognised in a graph, and agrees with ONNX Runtime on the original.

Feeds of two sizes are drawn as recognition draws them, one function is built for each, and every output is compared in
single precision. A graph that cannot be lowered is no failure if the error names the operator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

_LOG = logging.getLogger(__name__)
# Of the largest number of an output. What is computed in half precision differs by what each engine leaves unrounded.
TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1}
TOLERANCE = 1e-4

Runner = Callable[[Any, list[dict[str, Any]]], list[dict[str, Any]]]
Verdict = Literal["ok", "unsupported", "wrong", "failed"]


@dataclass(frozen=True)
class Coverage:
    """What became of one graph: how many sites were lowered, and the largest difference relative to the output."""

    verdict: Verdict
    sites: int
    error: float = 0.0
    detail: str = ""


def check(path: Path, rounds: Sequence[int] = (0, 1), run: Runner | None = None) -> Coverage:
    """Recognise, lower, build and compare one graph at sets of shapes; masks are hostile in all but the first.

    `run` gives the outputs of a graph for every set of feeds; TVM's unless told.
    """
    from rewriter.attention.feeds import usable_feeds
    from rewriter.attention.lower import float_dtype, lower
    from rewriter.attention.paths import Paths
    from rewriter.attention.recognise import recognise
    from rewriter.attention.trace import drawn
    from rewriter.core.errors import UnsupportedOperator
    from rewriter.core.site import State
    from rewriter.graph.onnx import load

    graph = load(path)
    sites = [site for site in recognise(graph).sites if site.state is State.LOWERABLE]
    paths, problems = Paths(graph), list[str]()
    runs = usable_feeds(drawn(graph, paths), paths, None, 7, problems)
    if runs is None:
        return Coverage("failed", len(sites), detail=f"no feeds: {problems[-1]}")
    feeds = _different([runs[number].feeds for number in rounds])
    try:
        results = (run or run_with_tvm)(lower(graph, sites), feeds)
    except UnsupportedOperator as problem:
        return Coverage("unsupported", len(sites), detail=problem.what)
    kinds = {str(spec.dtype) for spec in (*graph.inputs, *graph.outputs)} | {str(float_dtype(graph))}
    limit = max(TOLERANCES.get(kind, TOLERANCE) for kind in kinds)
    worst, where = 0.0, ""
    for number, (fed, actual) in enumerate(zip(feeds, results, strict=True)):
        for name, expected in reference(graph, path, fed).items():
            found = difference(expected, actual[name])
            if found > limit and no_worse(graph, fed, name, expected, actual[name]):
                continue
            if found > worst:
                worst, where = found, f"output {name} at size {number + 1}"
    return Coverage("ok" if worst <= limit else "wrong", len(sites), worst, "" if worst <= limit else where)


def no_worse(graph: Any, feeds: dict[str, Any], name: str, expected: Any, actual: Any) -> bool:
    """Whether double precision says that ours is about as right as ONNX Runtime's.

    Rows whose keys are all hidden by a large negative number give what digits of single precision are left.
    """
    import torch

    from rewriter.graph.interpreter import Interpreter

    if expected.dtype.kind != "f" or expected.shape != actual.shape:
        return False
    exact = Interpreter(graph, torch.float64).run(feeds)[name].numpy()
    theirs, ours = (difference(exact, found.astype(np.float64)) for found in (expected, actual))
    return bool(ours <= 2 * theirs < np.inf)


def reference(graph: Any, path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the original in ONNX Runtime; in the interpreter where that does not run it: bfloat16, and
    rotary tables of one batch for several, which the exporter writes at opset 23."""
    from models.export import run_plainly
    from rewriter.graph.interpreter import Interpreter
    from rewriter.graph.tensors import to_numpy

    names = [spec.name for spec in graph.outputs]
    try:
        return dict(zip(names, map(np.asarray, run_plainly(path, feeds)), strict=True))
    except Exception:  # noqa: BLE001 - its exceptions have no class in common
        _LOG.info("ONNX Runtime does not run %s", path.name, exc_info=True)
    return {name: to_numpy(value) for name, value in Interpreter(graph).run(feeds).items()}


def run_with_tvm(graph: Any, feeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs for each of `feeds`, by a module with one function for each."""
    import tvm
    from tvm import relax

    from rewriter.runtimes.tvm.compile import function_name
    from rewriter.runtimes.tvm.compile import lower as to_relax
    from rewriter.runtimes.tvm.target import detect, tvm_target

    target = detect("cpu", 1)
    module = to_relax(graph, [{name: array.shape for name, array in fed.items()} for fed in feeds], target)
    machine = relax.VirtualMachine(tvm.compile(module.functions, target=tvm_target(target)), tvm.cpu())
    results = []
    for index, (fed, program) in enumerate(zip(feeds, module.programs, strict=True)):
        given = [np.ascontiguousarray(fed[name]) for name in program.inputs]
        given += [module.parameters[name] for name in module.arguments[index]]
        made = machine[function_name(index)](*(tvm.runtime.tensor(array) for array in given))
        results.append({name: value.numpy() for name, value in zip(program.outputs, made, strict=True)})
    return results


def difference(expected: Any, actual: Any) -> float:
    """The largest difference relative to the largest number; infinite where shapes, dtypes or places of NaN differ."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.dtype.kind not in "fV":
        return 0.0 if np.array_equal(expected, actual) else float("inf")
    wanted, got = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(wanted[~finite], got[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(wanted[finite]).max()), 1e-6)
    return float(np.abs(wanted - got)[finite].max()) / scale


def _different(feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those whose shapes are new: graphs without dynamic axes take only one."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for fed in feeds:
        seen.setdefault(tuple((name, array.shape) for name, array in fed.items()), dict(fed))
    return list(seen.values())
