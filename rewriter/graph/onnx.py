"""The graph the machine works on: an `onnx_ir.Model` with lookups by value name.

Values are addressed by name throughout, nodes by the values they make: names of nodes are empty or repeated in
the wild.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir

from rewriter.core.errors import ModelError
from rewriter.graph.fingerprint import fingerprint_model
from rewriter.graph.reading import read_model
from rewriter.graph.writing import write_model


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph input or output. Unknown axes are None, dynamic ones carry their name."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype}[{sizes}]"


class OnnxGraph:
    """A model with unique, non-empty value names, sorted nodes and no functions.

    Omitted optional outputs of a node keep the empty name. Initialisers that are also listed as inputs (IR version 3)
    count as constants, never as inputs.
    """

    def __init__(self, model: ir.Model, path: Path | None = None) -> None:
        self.model, self.path = model, path
        self._index: dict[str, ir.Value] = {}

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return int(self.model.opset_imports.get("", 1))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed, in the model's order."""
        return tuple(_spec(value) for value in self.model.graph.inputs if not value.is_initializer())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out, in the model's order."""
        return tuple(_spec(value) for value in self.model.graph.outputs)

    @property
    def constants(self) -> dict[str, ir.Value]:
        """All initialisers by name."""
        return dict(self.model.graph.initializers)

    def topological(self) -> list[ir.Node]:
        """The nodes of the main graph, producers first."""
        return list(self.model.graph)

    def values(self) -> Iterator[ir.Value]:
        """Every value of the main graph once: inputs, initialisers, node outputs."""
        graph = self.model.graph
        yield from graph.inputs
        yield from (value for value in graph.initializers.values() if not value.is_graph_input())
        for node in graph:
            yield from (value for value in node.outputs if value.name)

    def has(self, name: str) -> bool:
        """Whether the main graph has a value of that name."""
        return self._find(name) is not None

    def value(self, name: str) -> ir.Value:
        """The value of that name; raises `ModelError` if there is none."""
        value = self._find(name)
        if value is None:
            raise ModelError(f"the graph has no value named {name!r}", "Use a name that `optimize inspect` lists")
        return value

    def constant(self, name: str) -> np.ndarray | None:
        """The array behind an initialiser or a `Constant` node, or None if the value is computed."""
        value = self._find(name)
        return None if value is None else constant_of(value)

    def dataflow(self) -> nx.DiGraph:
        """Value names as vertices; an edge from every input of a node to every output, with the node as `node`.

        Values that a subgraph takes from outside count as inputs of the node that holds it.
        """
        flow = nx.DiGraph()
        flow.add_nodes_from(value.name for value in self.values())
        for node in self.model.graph:
            sources, targets = reads(node), [value.name for value in node.outputs if value.name]
            flow.add_edges_from((source, target, {"node": node}) for source in sources for target in targets)
        return flow

    def clone(self) -> OnnxGraph:
        """A copy whose nodes can be edited; weights are shared, they are never written to."""
        return OnnxGraph(self.model.clone(), self.path)

    def fingerprint(self) -> str:
        """sha256 over structure, names, attributes and weights; the same in every process."""
        return fingerprint_model(self.model)

    def save(self, path: Path | str, external_above_bytes: int = 1_500_000_000) -> Path:
        """Write atomically; weights go to ``<name>.data`` beside the file when they are larger than the limit.

        Raises `OutputError` when the place cannot be written, `ModelError` when the result would not be valid ONNX.
        """
        return write_model(self.model, Path(path), external_above_bytes)

    def _find(self, name: str) -> ir.Value | None:
        value = self._index.get(name)
        if value is not None and value.name == name and value.graph is self.model.graph:
            return value
        self._index = {value.name: value for value in self.values() if value.name}
        return self._index.get(name)


def load(path: Path | str) -> OnnxGraph:
    """Read a model from a file, or from a folder that holds ``model.onnx`` or one single ONNX file.

    Weights in external data stay memory-mapped. Model-local functions are inlined and unsorted nodes sorted. Raises
    `ModelError` for anything that cannot be used: missing, empty, truncated, not ONNX, malformed, too new.
    """
    model, file = read_model(Path(path))
    return OnnxGraph(model, file)


def reads(node: ir.Node) -> list[str]:
    """Names of all values a node depends on, once each: its inputs and what its subgraphs take from outside."""
    names = [value.name for value in node.inputs if value is not None and value.name]
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            names += captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            names += [name for graph in attribute.as_graphs() for name in captured(graph)]
    return list(dict.fromkeys(names))


def captured(graph: ir.Graph) -> list[str]:
    """Names a subgraph takes from the graphs around it."""
    own = {value.name for value in graph.inputs} | set(graph.initializers)
    needed: list[str] = []
    for node in graph:
        needed += reads(node)
        own |= {value.name for value in node.outputs}
    needed += [value.name for value in graph.outputs if value.name]
    return [name for name in dict.fromkeys(needed) if name not in own]


def constant_of(value: ir.Value) -> np.ndarray | None:
    """The array of an initialiser or of a `Constant` node's output."""
    if value.const_value is not None and value.is_initializer():
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, dtype=np.int64)
    return None


def _spec(value: ir.Value) -> TensorSpec:
    dtype = (
        np.dtype(object) if value.dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING) else value.dtype.numpy()
    )
    if value.shape is None:
        return TensorSpec(value.name or "", dtype, ())
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return TensorSpec(value.name or "", dtype, sizes)
