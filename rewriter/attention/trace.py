"""One run of a graph with every value kept, and partial re-execution: what recognition by intervention stands on.

Structure proposes candidates, `Trace.probe` decides: it replaces one value, recomputes only the nodes between it and
another value, and leaves everything else as recorded. All of it in float64, so that tolerances can be tight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from rewriter.attention.paths import Paths
from rewriter.attention.recipes import Ledger
from rewriter.attention.values import Values
from rewriter.attention.weights import Weights
from rewriter.core.site import Array, AttentionSite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, reads

VIEWS = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Split",
        "Slice",
        "Gather",
        "Expand",
        "Tile",
        "Concat",
        "Identity",
        "Flatten",
        "Cast",
        "Pad",
    ]
)
DATA_FIRST = frozenset(
    [
        "Reshape",
        "Expand",
        "Tile",
        "Gather",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Split",
        "Pad",
        "ScatterND",
        "GatherElements",
    ]
)
PRODUCTS = frozenset(("MatMul", "FusedMatMul", "Einsum"))
SHAPES = frozenset(("Shape", "Size"))


def inputs_of(node: ir.Node) -> list[str]:
    """Names of a node's inputs, "" where an optional one is left out."""
    return ["" if value is None else str(value.name) for value in node.inputs]


def outputs_of(node: ir.Node) -> list[str]:
    """Names of a node's outputs."""
    return [str(value.name) for value in node.outputs if value.name]


def label(node: ir.Node) -> str:
    """How reports name a node: by its name, or by its first output if it has none."""
    return node.name or (outputs_of(node) or [node.op_type])[0]


def drawn(graph: OnnxGraph, paths: Paths, noise: int | None = None) -> Interpreter:
    """A float64 interpreter with drawn numbers in place of large matrices, with noise on the others if asked for."""
    return Interpreter(graph, torch.float64, constants=Weights(graph, paths, noise))


class Trace:
    """A graph, the values of one run (float64), its producers and consumers, and partial re-execution.

    With `like`, the structure is taken from another run of the same graph. `fixed` holds the names computed from
    initialisers alone (possible weights), `shaped` adds what shapes decide.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        feeds: Mapping[str, np.ndarray],
        interpreter: Interpreter | None = None,
        like: Trace | None = None,
    ) -> None:
        self.graph, self.feeds = graph, dict(feeds)
        self.paths: Paths = like.paths if like else Paths(graph)
        self.interpreter = interpreter or drawn(graph, self.paths)
        self.env = Values(self.interpreter, self.paths, feeds)
        self.recipes: Ledger = {}
        self.loops: dict[str, tuple[str, AttentionSite | None]] = {}  # what joins heads: first anchor and site
        self.nodes, self.producer, self.consumers = self.paths.nodes, self.paths.producer, self.paths.consumers
        self.outputs = {spec.name for spec in graph.outputs}
        self.inputs = {spec.name for spec in graph.inputs}
        self.fixed: set[str]
        self.shaped: set[str]
        self.fixed, self.shaped = (like.fixed, like.shaped) if like else self._constancy()

    def _constancy(self) -> tuple[set[str], set[str]]:
        fixed = {name for name in self.graph.model.graph.initializers if name not in self.inputs}
        shaped = set(fixed)
        for node in self.nodes:
            names = reads(node)
            random = node.op_type.startswith("Random") or node.op_type == "Bernoulli"
            if not random and all(name in fixed for name in names):
                fixed.update(outputs_of(node))
            if node.op_type in SHAPES or (not random and all(name in shaped for name in names)):
                shaped.update(outputs_of(node))
        return fixed, shaped

    def value(self, name: str) -> Array:
        """The recorded value as numpy (floats are float64)."""
        tensor = self.env[name]
        return np.asarray((tensor.double() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the recorded value."""
        return self.env.shape(name)

    def floating(self, name: str) -> bool:
        """Whether the value holds floating-point numbers."""
        if name not in self.env.shapes and name in self.env:
            self.env.shape(name)
        return name in self.env.floats

    def size(self, name: str) -> int:
        """Number of elements of the recorded value."""
        return int(np.prod(self.shape(name)))

    def position(self, name: str) -> int:
        """Topological index of the producer; -1 for inputs and constants."""
        return self.paths.position(name)

    def between(self, source: str, target: str) -> list[ir.Node] | None:
        """Nodes on the paths from one value to another, in order; None if there is no path."""
        return self.paths.between(source, target, self.shaped)

    def probe(self, source: str, target: str, replacements: Sequence[Array]) -> list[Array] | None:
        """The target for each replacement of the source, everything else as recorded; None if there is no path."""
        if source == target:
            return [np.asarray(r) for r in replacements]
        path = self.between(source, target)
        if path is None:
            return None
        needed = {name for node in path for name in reads(node) if name in self.env}
        results = []
        for replacement in replacements:
            env = {name: self.env[name] for name in needed}
            env[source] = torch.from_numpy(np.array(replacement, copy=True)).to(self.env[source].dtype)
            self.interpreter.run_nodes(path, env)
            results.append(np.asarray(env[target].numpy()))
        return results

    def dominators(self, source: str, target: str) -> list[str]:
        """Values that every path from source to target goes through, source first, target last."""
        path = self.between(source, target)
        if not path:
            return [target]
        last_use = {name: i for i, node in enumerate(path) for name in reads(node)}
        live: set[str] = {source}
        found: list[str] = []
        for i, node in enumerate(path):
            live = {name for name in live if last_use.get(name, -1) > i}
            live.update(name for name in outputs_of(node) if last_use.get(name, -1) > i or name == target)
            if len(live) == 1:
                found += live
        return [source, *(name for name in dict.fromkeys(found) if name != target), target]

    def weight(self, name: str) -> bool:
        """Whether a value can be a weight: constant, or cut from a constant by sizes that shapes decide."""
        if name in self.fixed:
            return True
        return name in self.shaped and self.floating(name) and self.original_initializer(name) in self.fixed

    def drawn(self, name: str) -> bool:
        """Whether a weight's numbers are drawn, not the model's."""
        constants = self.interpreter.constants
        return isinstance(constants, Weights) and self.original_initializer(name) in constants.drawn

    def linear(self, node: ir.Node) -> tuple[int, str] | None:
        """(position of the data input, name of the weight) if the node multiplies data by a constant weight."""
        names = inputs_of(node)
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm") or (node.op_type == "Einsum" and len(names) == 2):
            constant = [self.weight(name) for name in names[:2]]
            if constant == [False, True]:
                return 0, names[1]
            if constant == [True, False]:
                return 1, names[0]
        if node.op_type == "Conv" and self.weight(names[1]):
            return 0, names[1]
        return None

    def bilinear(self, node: ir.Node) -> bool:
        """True if the node multiplies two activations."""
        names = inputs_of(node)
        return node.op_type in PRODUCTS and len(names) == 2 and not any(self.weight(name) for name in names)

    def data_inputs(self, node: ir.Node) -> list[str]:
        """The inputs that carry data, without shapes, indices and conditions."""
        names = inputs_of(node)
        if node.op_type in ("ScatterND", "ScatterElements"):
            return [names[0], names[2]]
        if node.op_type in DATA_FIRST:
            return names[:1]
        return names[1:] if node.op_type == "Where" else [name for name in names if name]

    def original_initializer(self, name: str) -> str:
        """The initializer a constant was made from by views alone, for reports; the name itself otherwise."""
        node = self.producer.get(name)
        while node is not None and node.op_type in VIEWS | {"DequantizeLinear"} and inputs_of(node):
            name = inputs_of(node)[0]
            node = self.producer.get(name)
        return name

    def weight_dtype(self, name: str) -> np.dtype[np.generic]:
        """The dtype in which the model computes with a constant (the trace itself is float64)."""
        node = self.producer.get(name)
        while node is not None and node.op_type in VIEWS and inputs_of(node):
            if node.op_type == "Cast":
                return ir.DataType(node.attributes["to"].as_int()).numpy()
            name = inputs_of(node)[0]
            node = self.producer.get(name)
        constant = self.graph.constant(self.original_initializer(name))
        return np.dtype(np.float32) if constant is None or constant.dtype.kind not in "fV" else constant.dtype


def close(actual: Array, expected: Array, tolerance: float = 1e-9) -> bool:
    """Equal up to `tolerance` of the largest expected magnitude; shapes must agree, NaN never does."""
    if actual.shape != expected.shape:
        return False
    if not actual.size:
        return True
    scale = float(np.abs(expected).max())
    return bool(np.abs(actual - expected).max() <= tolerance * max(scale, 1e-12))
