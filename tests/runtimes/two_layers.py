"""A graph that every runtime can run, batches for it, and a target to build it for."""

from __future__ import annotations

import numpy as np

from rewriter.core.target import Target
from rewriter.graph.composites import composite
from rewriter.graph.onnx import OnnxGraph
from tests.runtimes.composite_graphs import constant, graph_of, tensor_input

TARGET = Target("llvm", "test", "generic", "x86_64", 1, 1, 8, 16, 32 << 10, 1 << 20, 1 << 24)


def two_layers(opset: int = 17) -> OnnxGraph:
    """(B, S, 32) to the same through 64 hidden units."""
    rng = np.random.default_rng(0)
    arrays = {"w1": rng.normal(size=(32, 64)), "b1": rng.normal(size=64), "w2": rng.normal(size=(64, 32)) / 8}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    c = {name: constant(name, array) for name, array in arrays.items()}
    x = tensor_input("x", np.float32, ("B", "S", 32))
    up = composite("Linear", [x, c["w1"], c["b1"]], "hidden", activation="gelu")
    down = composite("Linear", [*up.outputs, c["w2"]], "y")
    return graph_of([up, down], [x], arrays, opset)


def batch(size: int, tokens: int) -> dict[str, np.ndarray]:
    """Values that depend on the size alone."""
    return {"x": np.random.default_rng(size).normal(size=(size, tokens, 32)).astype(np.float32)}
