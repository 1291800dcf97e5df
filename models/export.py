"""One model, written as ONNX by every exporter people use: what the recogniser has to read.

A variant is a letter, an opset and perhaps a number format: ``l17`` is the TorchScript exporter with dynamic axes,
``t17`` the same with fixed shapes, ``d18`` the dynamo exporter with dynamic axes, ``s18`` the same with fixed shapes.
A last ``h`` or ``b`` is for modules turned to float16 or bfloat16 before they are exported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from models.families.family import Example
from models.quiet import quiet

VARIANTS = ("l17", "t17", "d18", "d20", "d23", "d24", "s18")
_VARIANT = re.compile(r"([ltds])(\d+)([hb]?)")
_FORMATS = {"h": torch.float16, "b": torch.bfloat16}


def export(build: Callable[[], Example], variant: str, path: Path) -> Example:
    """Write a freshly built example as ONNX, outputs named o0, o1, ...; returns the example that was written.

    `build` must make a new module each time: the TorchScript exporter can leave submodules in training mode, and a
    later export of the same object would hold active dropout.
    """
    parts = _VARIANT.fullmatch(variant)
    if parts is None:
        raise ValueError(f"unknown variant {variant!r}: write one like {', '.join(VARIANTS)}")
    exporter, opset = parts[1], int(parts[2])
    example = cast(build(), variant)
    outputs = [f"o{i}" for i in range(len(example.outputs()))]
    with quiet(), torch.no_grad():
        if exporter in "lt":
            _by_torchscript(example, opset, outputs, path, dynamic=exporter == "l")
        else:
            _by_dynamo(example, opset, outputs, path, dynamic=exporter == "d")
    return example


def convert_to_half(source: Path, target: Path, keep_interface: bool) -> None:
    """Turn a float32 graph to float16 as ONNX Runtime's converter does: casts appear around what it keeps in float32.

    With `keep_interface` inputs and outputs stay float32.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_interface), target)


def cast(example: Example, variant: str) -> Example:
    """The example with weights and floating inputs in the number format of a variant."""
    dtype = _FORMATS.get(variant[-1])
    if dtype is None:
        return example
    inputs = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in example.inputs)
    return replace(example, module=example.module.to(dtype), inputs=inputs)


def deviation(example: Example, path: Path) -> float:
    """Largest absolute difference between the file in ONNX Runtime, its optimizer off, and the module.

    Raises `ValueError` if the module's first output hardly varies: a comparison on it would prove nothing.
    """
    wanted = [tensor.numpy() for tensor in example.outputs()]
    if wanted[0].std() < 1e-3:
        raise ValueError("the output does not vary")
    got = run_plainly(path, {name: tensor.numpy() for name, tensor in zip(example.names, example.inputs, strict=True)})
    return max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True))


def run_plainly(path: Path, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs in ONNX Runtime on one thread without graph optimisation; feeds the graph dropped are left out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    return list(session.run(None, {name: value for name, value in feeds.items() if name in wanted}))


def _by_torchscript(example: Example, opset: int, outputs: list[str], path: Path, dynamic: bool) -> None:
    axes = {name: dict(axes) for name, axes in zip(example.names, example.axes, strict=True) if axes}
    torch.onnx.export(
        example.module,
        example.inputs,
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=list(example.names),
        output_names=outputs,
        dynamic_axes=axes if dynamic else None,
        verbose=False,
    )


def _by_dynamo(example: Example, opset: int, outputs: list[str], path: Path, dynamic: bool) -> None:
    shapes = _dynamic_shapes(example) if dynamic else None
    exported = torch.export.export(example.module, example.inputs, dynamic_shapes=shapes, strict=False)
    program = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=list(example.names),
        output_names=outputs,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))


def _dynamic_shapes(example: Example) -> tuple[Any, ...]:
    """Axes in the form torch.export wants: AUTO per dynamic axis, variadic inputs nested in one tuple."""
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) or None for axes in example.axes)
    parameters = list(inspect.signature(example.module.forward).parameters.values())
    if parameters[-1].kind == inspect.Parameter.VAR_POSITIONAL:
        fixed = len(parameters) - 1
        return (*shapes[:fixed], shapes[fixed:])
    return shapes
