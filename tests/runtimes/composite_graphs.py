"""Tiny graphs around one composite, with the shapes of their inputs left dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.graph.composites import COMPOSITE_DOMAIN, COMPOSITE_VERSION, composite
from rewriter.graph.onnx import OnnxGraph

Shape = tuple[int | str | None, ...]


def graph_of(
    nodes: list[ir.Node], inputs: list[ir.Value], constants: Mapping[str, np.ndarray], opset: int
) -> OnnxGraph:
    """A graph whose output is that of the last node; `constants` are initialisers made by `constant`."""
    output = nodes[-1].outputs[0]
    output.type = output.type or inputs[0].type
    if output.shape is None:
        rank = {"Attention": 3, "SplitHeads": 4}.get(nodes[-1].op_type) or len(inputs[0].shape or ())
        output.shape = ir.Shape([f"y{axis}" for axis in range(rank)])
    graph = ir.Graph(
        inputs, [output], nodes=nodes, name="test", opset_imports={"": opset, COMPOSITE_DOMAIN: COMPOSITE_VERSION}
    )
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.name in constants and value.name not in graph.initializers:
                graph.register_initializer(value)
    ir_version = 8 if opset < 19 else 10 if opset < 23 else 11
    return OnnxGraph(ir.Model(graph, ir_version=ir_version))


def tensor_input(name: str, dtype: np.dtype[Any] | type, shape: Shape) -> ir.Value:
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
    )


def single(
    operator: str,
    inputs: Mapping[str, tuple[np.dtype[Any] | type, Shape]],
    constants: Mapping[str, np.ndarray],
    opset: int,
    order: tuple[str, ...] = (),
    **attributes: Any,
) -> OnnxGraph:
    """One composite on graph inputs and initialisers, in `order` (inputs first unless told)."""
    fed = {name: tensor_input(name, *kinds) for name, kinds in inputs.items()}
    made = {name: constant(name, array) for name, array in constants.items()}
    values = {**fed, **made}
    node = composite(operator, [values[name] for name in (order or tuple(values))], "y", **attributes)
    return graph_of([node], list(fed.values()), constants, opset)
