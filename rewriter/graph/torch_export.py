"""From torch to a graph: modules, exported programs and fx graphs become ONNX through torch's own exporter."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.core.errors import ModelError, UserError
from rewriter.graph.onnx import OnnxGraph, load

OPSET = 20


def from_torch(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: Sequence[Tensor] = (),
    input_names: Sequence[str] = (),
    dynamic_shapes: Any = None,
    opset: int = OPSET,
) -> OnnxGraph:
    """The graph of a torch model.

    `model` is a module or an `fx.GraphModule` (`inputs` are then one example of what it takes), or an
    `ExportedProgram`, decomposed or not. `dynamic_shapes` is what `torch.export.export` takes; without it the axes of
    a module's example are fixed. Raises `UserError` if the exporter is not installed or an example is missing,
    `ModelError` if torch cannot export the model.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("torch models need onnxscript", "Install it: pip install 'attention-rewriter[models]'")
    program = model if isinstance(model, torch.export.ExportedProgram) else _program(model, inputs, dynamic_shapes)
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
    return graph


def _program(model: nn.Module, inputs: Sequence[Tensor], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if not inputs:
        raise UserError("a torch module needs an example of its inputs", "Give inputs=(tensor, ...)")
    # what torch.export has made is in evaluation mode for good, and refuses to be told so
    settled = isinstance(model, torch.fx.GraphModule)
    was_training = model.training
    try:
        with _quiet(), torch.no_grad():
            evaluated = model if settled else model.eval()
            return torch.export.export(evaluated, tuple(inputs), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as problem:
        raise _failed("exported", problem) from problem
    finally:
        if not settled:
            model.train(was_training)


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
