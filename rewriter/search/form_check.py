"""Whether a form of attention is the same function as the one written out: by its definition, and in ONNX Runtime.

A kernel may be wrong where its operator is right (ONNX Runtime 1.31 gives zeros for an item that is masked whole by a
finite number). So one copy of a sub-block is written in both forms with its axes left dynamic, and run on values that
the model has at three sizes, two of them with hostile masks. What differs is not timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from rewriter.attention.feeds import usable_feeds
from rewriter.attention.identity import TOLERANCE, difference
from rewriter.attention.lower import fragment
from rewriter.attention.paths import Paths
from rewriter.core.errors import UserError
from rewriter.core.refusal import Refusal
from rewriter.core.site import AttentionSite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Fragment
from rewriter.runtimes.base import of_spec
from rewriter.runtimes.standard import AS_CHOSEN, to_standard
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.chain import build_chain
from rewriter.search.form_prices import with_typed_outputs

Values = Mapping[str, NDArray[Any]]
_SINGLE = 1e-4  # of the largest magnitude, in float32
_LIMIT_S = 120.0


def hostile_values(original: OnnxGraph, lowered: OnnxGraph, names: Sequence[str], seed: int) -> list[Values]:
    """What sub-blocks read on small inputs of up to three sizes, most with hostile masks; empty if none fit."""
    with torch.no_grad():
        runs = usable_feeds(Interpreter(original), Paths(original), None, seed) or []
        interpreter = Interpreter(lowered)
        taps = [interpreter.run(dict(run.feeds), taps=names) for run in runs]
    return [{name: run[name].numpy() for name in names} for run in taps]


def one_copy(graph: OnnxGraph, site: AttentionSite, batches: Sequence[Values]) -> OnnxGraph:
    """A graph of the sub-block alone, as the forms chosen for the site write it; axes that vary are dynamic."""
    piece = fragment(graph, site)
    made = build_chain(graph, site, piece, batches[0], 1).graph
    for value in made.model.graph.inputs:
        shapes = [batch[str(value.name)].shape for batch in batches]
        value.shape = ir.Shape([sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)])
    return to_standard(with_typed_outputs(made), AS_CHOSEN)


def reads_of(pieces: Sequence[Fragment]) -> list[str]:
    """All values that fragments read."""
    return sorted({name for piece in pieces for name in piece.reads()})


def check_forms(
    pieces: Sequence[OnnxGraph], batches: Sequence[Values], worker: Worker, runtime: str, folder: Path
) -> list[Refusal | None]:
    """For every graph after the first, why it is not the first one, or None. All run in a worker, which may crash."""
    feeds = [[_fed(piece, batch) for batch in batches] for piece in pieces]
    folder.mkdir(parents=True, exist_ok=True)
    found: list[list[NDArray[Any]] | str] = []
    for index, piece in enumerate(pieces):
        saved = piece.save(folder / f"form_{index}.onnx")
        answer = worker.call(f"{__name__}:run_all", runtime, saved, feeds[index], timeout_s=_LIMIT_S)
        found.append(str(answer) if isinstance(answer, WorkerFailure) else answer)
    wanted = [_exact(pieces[0], fed) for fed in feeds[0]]
    refusals = []
    for index in range(1, len(pieces)):
        why = _runtime_problem(found[0], found[index]) or _definition_problem(pieces[index], feeds[index], wanted)
        refusals.append(Refusal("form-differs", why) if why else None)
    return refusals


def run_all(runtime: str, model: Path, feeds: Sequence[Values]) -> list[NDArray[Any]]:
    """In the worker: the first output on every batch."""
    executable = of_spec(runtime).load(model, 1)
    return [next(iter(executable.run(fed).values())) for fed in feeds]


def _fed(piece: OnnxGraph, batch: Values) -> dict[str, NDArray[Any]]:
    return {spec.name: np.ascontiguousarray(batch[spec.name]) for spec in piece.inputs}


def _exact(piece: OnnxGraph, fed: Values) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(Interpreter(piece, torch.float64).run(dict(fed)).values()))


def _runtime_problem(wanted: list[NDArray[Any]] | str, found: list[NDArray[Any]] | str) -> str:
    if isinstance(wanted, str) or isinstance(found, str):
        return f"it does not run: {found if isinstance(found, str) else wanted}"
    worst = max(difference(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, wanted, strict=True))
    return "" if worst <= _SINGLE else f"the runtime's kernel differs by {worst:.1e} of the result's scale"


def _definition_problem(piece: OnnxGraph, feeds: Sequence[Values], wanted: Sequence[torch.Tensor]) -> str:
    try:
        worst = max(difference(_exact(piece, fed), right) for fed, right in zip(feeds, wanted, strict=True))
    except UserError as problem:
        return problem.what
    return "" if worst <= TOLERANCE else f"by its definition it differs by {worst:.1e} of the result's scale"
