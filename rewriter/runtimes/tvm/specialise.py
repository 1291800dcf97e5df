"""From a graph and concrete input shapes to a `Program`: shape arithmetic is folded away.

The graph is run once at these shapes. A value that depends on nothing but shapes and constants becomes a constant;
every other value only lends its shape and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.core.errors import ModelError, OptionError, UnsupportedOperator
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, TensorSpec, reads
from rewriter.graph.tensors import to_numpy
from rewriter.runtimes.tvm.program import Node, Program, Value

ENGINE = "TVM"
_SHAPE_ONLY = frozenset({"Shape", "Size", "EyeLike"})
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def specialise(graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """The program of `graph` for inputs of these shapes.

    Raises `OptionError` when a shape is missing or contradicts the graph, `UnsupportedOperator` for control flow that
    depends on data and for random operators.
    """
    feeds, known = _one_run(graph, shapes)
    static = _static_names(graph)
    constants = {name: graph.constant(name) for name in static}
    values = {}
    for name, array in {**feeds, **known}.items():
        values[name] = Value(name, tuple(array.shape), array.dtype, array if name in static else None)
    for name, constant in constants.items():
        if constant is not None:
            values[name] = Value.of(name, np.asarray(constant))
    nodes = [_node(node, graph) for node in graph.topological() if not _folded(node, static)]
    program = Program(
        tuple(spec.name for spec in graph.inputs), tuple(spec.name for spec in graph.outputs), nodes, values
    )
    program.prune()
    return program


def _one_run(
    graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """(feeds, every other value). Whole numbers are zero, which every table has a row for; where that fails, one."""
    interpreter = Interpreter(graph)
    for whole in (0, 1):
        feeds = {spec.name: _example(spec, shapes, whole) for spec in graph.inputs}
        try:
            values = interpreter.run(feeds, taps="all")
        except ModelError:
            if whole:
                raise
            continue
        return feeds, {name: _array(value) for name, value in values.items()}
    raise AssertionError("the last attempt returns or raises")


def _example(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]], whole: int) -> NDArray[Any]:
    shape = shapes.get(spec.name, spec.shape)
    if not all(isinstance(size, int) for size in shape):
        raise OptionError(f"input {spec.name} has no fixed shape", f"Give it, like --shape {spec.name}=1x128")
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(wanted, int) or wanted == size for wanted, size in zip(spec.shape, shape, strict=True)
    )
    if not fits and spec.shape:
        raise OptionError(f"shape {shape} does not fit input {spec}", "Give as many sizes as the input has axes")
    sizes = tuple(int(size) for size in shape if size is not None)
    if spec.dtype.kind == "f" or spec.dtype == ml_dtypes.bfloat16:
        return np.random.default_rng(0).standard_normal(sizes).astype(spec.dtype)
    return np.ones(sizes, spec.dtype) if spec.dtype.kind == "b" else np.full(sizes, whole, spec.dtype)


def _array(value: Any) -> NDArray[Any]:
    return to_numpy(value) if hasattr(value, "detach") else np.asarray(value)


def _static_names(graph: OnnxGraph) -> set[str]:
    """Names of values that no input's content can change."""
    static = {str(value.name) for value in graph.constants.values()}
    for node in graph.topological():
        if node.op_type in _RANDOM and not node.domain:
            continue
        if (node.op_type in _SHAPE_ONLY and not node.domain) or all(name in static for name in reads(node)):
            static.update(output.name for output in node.outputs if output.name)
    return static


def _folded(node: ir.Node, static: set[str]) -> bool:
    return all(output.name in static for output in node.outputs if output.name)


def _node(node: ir.Node, graph: OnnxGraph) -> Node:
    label = str(node.name or (node.outputs[0].name if node.outputs else ""))
    if node.op_type in _RANDOM and not node.domain:
        raise UnsupportedOperator(ENGINE, node.op_type, label, "random values")
    attributes: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise UnsupportedOperator(ENGINE, node.op_type, label, "control flow that depends on data")
        attributes[name] = (
            attribute.as_tensor().numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value
        )
    return Node(
        node.op_type,
        node.domain,
        tuple(value.name or "" if value is not None else "" for value in node.inputs),
        tuple(output.name or "" for output in node.outputs),
        attributes,
        label,
        int(graph.model.opset_imports.get(node.domain, 1)),
    )
