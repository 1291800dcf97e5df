"""Two graphs in one file: a model that is a single `If` over an input, with all its work in the branches.

Exporters of decoders merge the graph that takes a cache and the one that takes none in this way, so that both share
one copy of the weights. Attention inside a branch cannot be rewritten where it is; apart, each branch is a graph as any
other, and afterwards they are put together again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.core.errors import ModelError
from rewriter.graph.onnx import OnnxGraph, reads

BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True)
class Branch:
    """One branch as a graph of its own: `name` is ``then_branch`` or ``else_branch``."""

    name: str
    graph: OnnxGraph


def split_merged(graph: OnnxGraph) -> tuple[Branch, Branch] | None:
    """Both branches, each with the inputs that it reads and the outputs of the whole; None for any other graph."""
    node = _decides(graph)
    if node is None:
        return None
    return Branch(BRANCHES[0], _branch(graph, BRANCHES[0])), Branch(BRANCHES[1], _branch(graph, BRANCHES[1]))


def join_merged(merged: OnnxGraph, branches: tuple[OnnxGraph, OnnxGraph]) -> OnnxGraph:
    """The merged graph with other branches, in the order of `split_merged`; equal weights are stored once.

    Inputs and outputs keep their names and order and take the shapes that the branches give them. Raises `ModelError`
    if a branch reads what is no input, or lacks an output.
    """
    whole = merged.clone()
    node = _decides(whole)
    assert node is not None
    outer = whole.model.graph
    for name in list(outer.initializers):
        del outer.initializers[name]
    weights = _Weights(outer)
    for name, branch in zip(BRANCHES, branches, strict=True):
        copy = branch.clone()
        _take_shapes(outer, copy)
        for domain, version in copy.model.opset_imports.items():
            outer.opset_imports.setdefault(domain, version)
        node.attributes[name] = ir.AttrGraph(name, _body(outer, copy, name, weights))
    outer.sort()
    RemoveUnusedNodesPass()(whole.model)
    return OnnxGraph(whole.model, merged.path)


def _decides(graph: OnnxGraph) -> ir.Node | None:
    """The `If` that makes every output, if its condition is an input and no other node does any work."""
    nodes = graph.topological()
    deciding = [node for node in nodes if node.op_type == "If" and not node.domain]
    if len(deciding) != 1 or any(value.producer() is not deciding[0] for value in graph.model.graph.outputs):
        return None
    others, condition = {id(node) for node in nodes} - {id(deciding[0])}, deciding[0].inputs[0]
    while condition is not None and condition.producer() is not None:
        maker = condition.producer()
        assert maker is not None
        others.discard(id(maker))
        condition = maker.inputs[0] if maker.inputs else None
    fed = condition is not None and condition.is_graph_input()
    return deciding[0] if fed and not others else None


def _branch(graph: OnnxGraph, name: str) -> OnnxGraph:
    copy = graph.clone()
    node = _decides(copy)
    assert node is not None
    outer, body = copy.model.graph, node.attributes[name].as_graph()
    given = [str(value.name) for value in outer.outputs]
    by_position = [given.index(str(value.name)) if value.name in given else -1 for value in node.outputs]
    made = list(body.outputs)
    body.outputs.clear()
    outer.outputs.clear()
    nodes = list(body)
    body.remove(nodes)
    for title, value in list(body.initializers.items()):
        del body.initializers[title]
        outer.register_initializer(value)
    for value in node.outputs:
        value.name = f"{value.name}/merged"
    outer.insert_before(node, nodes)
    outer.remove(node, safe=True)
    picked = {position: _own(outer, value) for position, value in zip(by_position, made, strict=True) if position >= 0}
    for position, title in enumerate(given):
        picked[position].name = title
        outer.outputs.append(picked[position])
    RemoveUnusedNodesPass()(copy.model)
    read = {title for one in outer for title in reads(one)} | {str(value.name) for value in outer.outputs}
    kept = [value for value in outer.inputs if value.name in read]
    outer.inputs.clear()
    outer.inputs.extend(kept)
    return OnnxGraph(copy.model, graph.path)


def _own(outer: ir.Graph, value: ir.Value) -> ir.Value:
    """A value that a node of the branch makes and no other output is: what is only handed through is copied."""
    if value.producer() is not None and not any(value is other for other in outer.outputs):
        return value
    copy = ir.node("Identity", [value])
    copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
    outer.append(copy)
    return copy.outputs[0]


class _Weights:
    """Initialisers of the merged graph: those of the same content are one."""

    def __init__(self, outer: ir.Graph) -> None:
        self.outer = outer
        self._known: dict[str, ir.Value] = {}

    def shared(self, value: ir.Value) -> ir.Value:
        """The merged graph's value for an initialiser of a branch."""
        assert value.const_value is not None
        array = np.ascontiguousarray(value.const_value.numpy())
        key = hashlib.sha256(f"{value.const_value.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
        if key not in self._known:
            name, count = str(value.name), 0
            while name in self.outer.initializers:
                count += 1
                name = f"{value.name}_{count}"
            tensor = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
            made = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
            self.outer.register_initializer(made)
            self._known[key] = made
        return self._known[key]


def _body(outer: ir.Graph, branch: OnnxGraph, name: str, weights: _Weights) -> ir.Graph:
    """The branch's nodes as a subgraph that reads inputs and weights of the graph around it."""
    inner = branch.model.graph
    inputs = {str(value.name): value for value in outer.inputs}
    for value in list(inner.inputs):
        if str(value.name) not in inputs:
            raise ModelError(f"{value.name!r} is no input of the merged graph", "Rewrite the graphs apart")
        value.replace_all_uses_with(inputs[str(value.name)], replace_graph_outputs=True)
    for value in list(inner.initializers.values()):
        value.replace_all_uses_with(weights.shared(value), replace_graph_outputs=True)
    order = {str(value.name): value for value in inner.outputs}
    missing = [str(value.name) for value in outer.outputs if str(value.name) not in order]
    if missing:
        raise ModelError(f"a branch lacks the output {missing[0]!r}", "Rewrite the graphs apart")
    inner.outputs.clear()
    nodes = list(inner)
    inner.remove(nodes)
    for node in nodes:
        node.name = f"{name}/{node.name or node.outputs[0].name}"
        for value in node.outputs:
            value.name = f"{name}/{value.name}" if value.name else ""
    return ir.Graph([], [order[str(value.name)] for value in outer.outputs], nodes=nodes, name=name)


def _take_shapes(outer: ir.Graph, branch: OnnxGraph) -> None:
    """Sizes that a branch knows of inputs and outputs become those of the whole; names of axes stay."""
    for side, own in ((outer.inputs, branch.model.graph.inputs), (outer.outputs, branch.model.graph.outputs)):
        known = {str(value.name): value for value in own}
        for value in side:
            new = known.get(str(value.name))
            if new is None or new.shape is None or value.shape is None or len(new.shape) != len(value.shape):
                continue
            pairs = zip(value.shape, new.shape, strict=True)
            value.shape = ir.Shape([size if isinstance(size, int) else old for old, size in pairs])
