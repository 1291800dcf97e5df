"""Peepholes on a `Program`: what the templates can do in one go is written as one node.

Order: products with constant weights become linear layers; biases, activations, residual sums and norms are drawn
in; linear layers of one input become one, whose parts attention reads as windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rewriter.runtimes.tvm.norm_patterns import find_norms
from rewriter.runtimes.tvm.patches import patches_as_linear
from rewriter.runtimes.tvm.program import Node, Program, Value

LINEAR, NORM, ATTENTION, SPLIT = "rewriter:Linear", "rewriter:Norm", "rewriter:Attention", "rewriter:SplitHeads"
ROTARY = "rewriter:Rotary"
_ACTIVATIONS = {"Gelu": "gelu", "Relu": "relu", "Tanh": "tanh", "QuickGelu": "quick_gelu"}


def fuse(program: Program) -> None:
    """Rewrite the program in place; its meaning stays."""
    skip_identities(program)
    share_equal_nodes(program)
    find_norms(program)
    program.prune()
    patches_as_linear(program)
    _each(program, _as_linear)
    _each(program, _bias)
    _each(program, _activation)
    _each(program, _residual)
    _each(program, _as_norm)
    _each(program, _sum_then_norm)
    _each(program, _split_heads)
    _each(program, _turned_heads)
    pack_projections(program)
    program.prune()


def skip_identities(program: Program) -> None:
    """Readers of a copy read the original, unless the copy is a graph output."""
    renamed: dict[str, str] = {}
    kept: list[Node] = []
    for node in program.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.key == "Identity" and node.outputs[0] not in program.outputs:
            renamed[node.outputs[0]] = node.inputs[0]
        else:
            kept.append(node)
    program.nodes = kept


def share_equal_nodes(program: Program) -> None:
    """Nodes that compute the same from the same inputs become one: many exports rebuild masks in every layer."""
    seen: dict[object, Node] = {}
    renamed: dict[str, str] = {}
    kept: list[Node] = []
    for node in program.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        key = (node.key, node.inputs, repr(sorted(node.attributes.items())), tuple(bool(o) for o in node.outputs))
        first = seen.setdefault(key, node)
        if first is node or set(node.outputs) & set(program.outputs):
            kept.append(node)
        else:
            renamed.update(zip(node.outputs, first.outputs, strict=True))
    program.nodes = kept


class _View:
    """The program while nodes are replaced: who makes a value, and how often it is read."""

    def __init__(self, program: Program) -> None:
        self.program, self.producers, self.uses = program, program.producers(), program.uses()

    def single(self, name: str, key: str) -> Node | None:
        """The producer of a value if it is of that kind and nobody else reads the value."""
        node = self.producers.get(name)
        return node if node is not None and node.key == key and self.uses.get(name) == 1 else None


def _each(program: Program, rule: Callable[[_View, Node], tuple[Node, tuple[Node, ...]] | None]) -> None:
    """Apply a rule to every node: it gives the replacement and the nodes that it swallowed."""
    view = _View(program)
    replaced: list[Node] = []
    gone: set[int] = set()
    for node in program.nodes:
        found = rule(view, node)
        if found is None:
            replaced.append(node)
            continue
        new, swallowed = found
        gone.update(id(old) for old in swallowed)
        replaced.append(new)
        view.producers.update(dict.fromkeys(new.outputs, new))
    program.nodes = [node for node in replaced if id(node) not in gone]


def _as_linear(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """MatMul, or plain Gemm, with a constant matrix."""
    if node.op not in ("MatMul", "Gemm") or node.domain:
        return None
    program, weight = view.program, view.program.constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or not program.shape(node.inputs[0])[:-1]:
        return None
    inputs: tuple[str, ...] = (node.inputs[0], node.inputs[1])
    if node.op == "Gemm":
        scales = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
        bias = node.input(2)
        simple = not bias or (
            program.constant(bias) is not None and program.shape(bias) == program.shape(node.outputs[0])[-1:]
        )
        if int(node.attributes.get("transA", 0)) or scales != (1.0, 1.0) or not simple:
            return None
        if int(node.attributes.get("transB", 0)):
            name = f"{node.inputs[1]}/transposed"
            if name not in program.values:
                program.values[name] = Value.of(name, np.ascontiguousarray(weight.T))
            inputs = (node.inputs[0], name)
        inputs = (*inputs, bias) if bias else inputs
    return replace(node, op="Linear", domain="rewriter", inputs=inputs, attributes={}), ()


def _open_linear(view: _View, name: str) -> Node | None:
    """A linear layer without activation and residual whose result only this reader wants."""
    found = view.single(name, LINEAR)
    if found is None or found.attributes.get("activation") or found.input(3):
        return None
    return found


def _bias(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """Linear without bias, plus a constant row."""
    if node.key != "Add":
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        linear, bias = _open_linear(view, one), view.program.constant(other)
        if linear is None or linear.input(2) or bias is None or bias.shape != view.program.shape(one)[-1:]:
            continue
        return replace(linear, inputs=(*linear.inputs[:2], other), outputs=node.outputs), (linear,)
    return None


def _activation(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """Linear, then an activation that the epilogue knows."""
    name = _ACTIVATIONS.get(node.op)
    linear = _open_linear(view, node.inputs[0]) if name else None
    if (
        linear is None
        or name is None
        or (node.op == "QuickGelu" and abs(node.attributes.get("alpha", 1.702) - 1.702) > 1e-6)
    ):
        return None
    if node.op == "Gelu" and node.attributes.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    attributes = {**linear.attributes, "activation": name}
    return replace(linear, attributes=attributes, outputs=node.outputs), (linear,)


def _residual(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """Linear plus another tensor of the same shape. The node stays where the sum was: both inputs exist there."""
    if node.key != "Add":
        return None
    shape = view.program.shape(node.outputs[0])
    for one, other in (node.inputs, node.inputs[::-1]):
        linear = view.single(one, LINEAR)
        if linear is None or linear.input(3) or one == other or view.program.shape(other) != shape:
            continue
        weight, bias = linear.inputs[1], linear.input(2)
        return replace(linear, inputs=(linear.inputs[0], weight, bias, other), outputs=node.outputs), (linear,)
    return None


def _as_norm(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """A norm over the last axis by the standard operators."""
    kinds = {"LayerNormalization": "layer", "RMSNormalization": "rms", "SimplifiedLayerNormalization": "rms"}
    program, kind = view.program, kinds.get(node.op)
    if kind is None or any(node.outputs[1:]) or program.dtype(node.inputs[0]) != np.float32:
        return None
    shape = program.shape(node.inputs[0])
    rows = [name for name in node.inputs[1:] if name]
    if int(node.attributes.get("axis", -1)) % len(shape) != len(shape) - 1:
        return None
    if any(program.shape(name) != shape[-1:] for name in rows):
        return None
    attributes = {"kind": kind, "epsilon": float(node.attributes.get("epsilon", 1e-5))}
    inputs = (node.inputs[0], "", node.inputs[1], node.input(2))
    return replace(
        node, op="Norm", domain="rewriter", inputs=inputs, outputs=node.outputs[:1], attributes=attributes
    ), ()


def _sum_then_norm(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """A sum of two tensors that only the norm reads (with other readers it stays a node of its own)."""
    if node.key != NORM or node.input(1):
        return None
    total = view.single(node.inputs[0], "Add")
    if total is None or {view.program.shape(name) for name in total.inputs} != {view.program.shape(node.inputs[0])}:
        return None
    return replace(node, inputs=(*total.inputs, *node.inputs[2:])), (total,)


def _split_heads(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """Attention reads heads where projections left them."""
    if node.key != ATTENTION:
        return None
    inputs = list(node.inputs)
    for index in range(3):
        source = view.producers.get(inputs[index])
        if source is not None and source.key == SPLIT:
            inputs[index] = source.inputs[0]
    return None if inputs == list(node.inputs) else (replace(node, inputs=tuple(inputs)), ())


def _turned_heads(view: _View, node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """Rotation reads heads where projections left them."""
    source = view.producers.get(node.inputs[0]) if node.key == ROTARY else None
    if source is None or source.key != SPLIT:
        return None
    inputs = (source.inputs[0], *node.inputs[1:])
    return replace(node, inputs=inputs, attributes={**node.attributes, "flat": 1}), ()


def pack_projections(program: Program) -> None:
    """Linear layers of one input and precision that only attention reads become one wide layer with windows."""
    groups: dict[tuple[str, str], list[Node]] = {}
    windows = _window_only(program)
    for node in program.nodes:
        weight = program.constant(node.input(1)) if node.key == LINEAR else None
        plain = weight is not None and not node.attributes.get("activation") and not node.input(3)
        if plain and node.outputs[0] in windows and len(program.shape(node.inputs[0])) == 3:
            groups.setdefault((node.inputs[0], str(node.attributes.get("precision", ""))), []).append(node)
    for members in groups.values():
        if len(members) > 1:
            _pack(program, members)


def _window_only(program: Program) -> set[str]:
    """Values of rank 3 that nothing but attention reads."""
    read: set[str] = set()
    other: set[str] = set(program.outputs)
    for node in program.nodes:
        operands = node.inputs[:3] if node.key == ATTENTION and not any(node.inputs[4:]) else ()
        read.update(name for name in operands if len(program.shape(name)) == 3)
        other.update(node.inputs[len(operands) :])
    return read - other


def _pack(program: Program, members: list[Node]) -> None:
    name, windows, start = f"{members[0].outputs[0]}/packed", {}, 0
    weights, biases = [], []
    for node in members:
        weight, bias = program.constant(node.inputs[1]), program.constant(node.input(2))
        assert weight is not None
        windows[node.outputs[0]] = (start, weight.shape[1])
        start += weight.shape[1]
        weights.append(weight)
        biases.append(np.zeros(weight.shape[1], np.float32) if bias is None else bias)
    inputs: tuple[str, ...] = (members[0].inputs[0], f"{name}/weight")
    program.values[inputs[1]] = Value.of(inputs[1], np.concatenate(weights, 1))
    if any(node.input(2) for node in members):
        inputs = (*inputs, f"{name}/bias")
        program.values[inputs[2]] = Value.of(inputs[2], np.concatenate(biases))
    shape = program.shape(members[0].outputs[0])
    program.values[name] = Value(name, (*shape[:-1], start), np.dtype(np.float32))
    packed = replace(members[0], inputs=inputs, outputs=(name,), name=name)
    gone = {id(node) for node in members[1:]}
    nodes = [packed if node is members[0] else node for node in program.nodes if id(node) not in gone]
    program.nodes = [_windowed(node, windows, name) if node.key == ATTENTION else node for node in nodes]


def _windowed(node: Node, windows: dict[str, tuple[int, int]], packed: str) -> Node:
    inputs, attributes = list(node.inputs), dict(node.attributes)
    for index, role in enumerate(("query", "key", "value")):
        if inputs[index] in windows:
            attributes[f"{role}_window"] = windows[inputs[index]]
            inputs[index] = packed
    return replace(node, inputs=tuple(inputs), attributes=attributes)
