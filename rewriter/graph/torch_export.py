"""From torch to a graph: modules, exported programs and fx graphs become ONNX through torch's own exporter."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.core.errors import ModelError, UserError
from rewriter.graph.onnx import OnnxGraph, load

OPSET = 20


@dataclass(frozen=True)
class Exported:
    """A torch model as a graph, with the program it was written from, and that program as the exporter decomposed it.

    Nodes of the graph carry the names of the decomposed program's nodes in their metadata (``pkg.torch.onnx.*``).
    """

    graph: OnnxGraph
    program: torch.export.ExportedProgram
    decomposed: torch.export.ExportedProgram | None


def from_torch(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: Sequence[Any] = (),
    input_names: Sequence[str] = (),
    dynamic_shapes: Any = None,
    opset: int = OPSET,
    kwargs: Mapping[str, Any] | None = None,
) -> OnnxGraph:
    """The graph of a torch model.

    `model` is a module or an `fx.GraphModule` (`inputs` and `kwargs` are then one example of what it takes, tensors or
    tuples, lists and dicts of them), or an `ExportedProgram`, decomposed or not. `dynamic_shapes` is what
    `torch.export.export` takes; without it the axes of a module's example are fixed. Raises `UserError` if the
    exporter is not installed or an example is missing, `ModelError` if torch cannot export the model.
    """
    return export_torch(model, inputs, input_names, dynamic_shapes, opset, kwargs).graph


def export_torch(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: Sequence[Any] = (),
    input_names: Sequence[str] = (),
    dynamic_shapes: Any = None,
    opset: int = OPSET,
    kwargs: Mapping[str, Any] | None = None,
) -> Exported:
    """Like `from_torch`, with what the graph was written from."""
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("torch models need onnxscript", "Install it: pip install 'attention-rewriter[models]'")
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        program = _program(model, inputs, kwargs, dynamic_shapes)
    options: dict[str, Any] = {"input_names": list(input_names)} if input_names else {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        try:
            written = torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False, **options)
        except Exception as problem:
            raise _failed("written as ONNX", problem) from problem
        assert written is not None
        written.save(str(path))
        graph = load(path)
        for value in graph.constants.values():
            if value.const_value is not None:
                value.const_value.numpy()  # mapped while the file is there; the mapping outlives its name
    return Exported(graph, program, written.exported_program)


def _program(
    model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    if not inputs and not kwargs:
        what = "a torch module needs an example of its inputs"
        raise UserError(what, "Give inputs=(tensor, ...) or kwargs={name: tensor}")
    was_training = model.training
    settled = not _evaluated(model)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(
                model, tuple(inputs), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as problem:
        raise _failed("exported", problem) from problem
    finally:
        if not settled:
            model.train(was_training)


def _evaluated(model: nn.Module) -> bool:
    """Put a module into evaluation mode; False for what torch.export has made, which refuses to be told."""
    try:
        model.eval()
    except NotImplementedError:
        return False
    return True


def _failed(what: str, problem: Exception) -> ModelError:
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return ModelError(f"torch model could not be {what}: {first}", "Try torch.export.export on it by itself")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
