"""Shape arithmetic that reads a replaced region must not keep it alive: it is rebuilt from values that stay needed.

Every axis is named by its sizes in two runs of coprime shapes: a constant, an axis of a value before it, a multiple of
one, or a sum of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from weakref import WeakKeyDictionary

import onnx_ir as ir

from rewriter.attention.build import Builder
from rewriter.attention.feeds import draw, roles, size_choices
from rewriter.attention.paths import Paths
from rewriter.attention.trace import SHAPES
from rewriter.core.errors import UserError
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph

Shape = tuple[int, ...]
_KNOWN: WeakKeyDictionary[OnnxGraph, tuple[dict[str, Shape], dict[str, Shape]]] = WeakKeyDictionary()


def remember(graph: OnnxGraph, first: Mapping[str, Shape], second: Mapping[str, Shape]) -> None:
    """Keep the shapes of two runs of a graph for lowering."""
    _KNOWN[graph] = (dict(first), dict(second))


def two_shapes(graph: OnnxGraph) -> tuple[dict[str, Shape], dict[str, Shape]] | None:
    """Shapes of every value in two runs of different sizes; None if the graph takes no feeds we can draw."""
    if graph in _KNOWN:
        return _KNOWN[graph]
    interpreter, known, found = Interpreter(graph), roles(graph), []
    for round_ in (0, 1):
        for sizes in size_choices(graph, round_):
            try:
                env = interpreter.run(draw(graph, sizes, known, seed=round_), taps="all")
            except UserError:
                continue
            found.append({name: tuple(tensor.shape) for name, tensor in env.items()})
            break
    if len(found) < 2:
        return None
    remember(graph, *found)
    return _KNOWN[graph]


def shape_readers(graph: OnnxGraph) -> list[tuple[ir.Node, str]]:
    """Shape nodes that are needed, whose input is needed for nothing but its shape."""
    paths = Paths(graph)
    outputs = [spec.name for spec in graph.outputs]
    really, alive = _above(paths, outputs, False), _above(paths, outputs, True)
    found = []
    for node in paths.nodes:
        if node.op_type == "Shape" and not node.domain and node.outputs[0].name in alive:
            source = paths.reads[id(node)][0]
            if source not in really:
                found.append((node, source))
    return found


def _above(paths: Paths, starts: Iterable[str], through_shapes: bool) -> set[str]:
    seen: set[str] = set()
    stack = list(starts)
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = paths.producer.get(name)
        if node is not None and (through_shapes or node.op_type not in SHAPES):
            stack += paths.reads[id(node)]
    return seen


def free_shapes(original: OnnxGraph, graph: OnnxGraph) -> None:
    """Rebuild the shape arithmetic of `graph` (edited from `original`) that would keep dead regions alive, in place."""
    readers = shape_readers(graph)
    if not readers:
        return
    shapes = two_shapes(original)
    if shapes is None:
        return
    paths = Paths(graph)
    really = _above(paths, [spec.name for spec in graph.outputs], False)
    builder = Builder("shapes", graph.opset, graph.value)
    for node, source in readers:
        if source in shapes[0] and source in shapes[1]:
            axes = _named_axes(graph, paths, _above(paths, [source], True) & really, shapes)
            _rebuild(builder, node, list(zip(shapes[0][source], shapes[1][source], strict=True)), axes)
    install(graph, builder, {str(value.name): value for value in graph.values()})


def _named_axes(
    graph: OnnxGraph, paths: Paths, names: set[str], shapes: tuple[dict[str, Shape], dict[str, Shape]]
) -> dict[tuple[int, int], tuple[str, int]]:
    """A value and its axis for every pair of sizes, inputs first."""
    axes: dict[tuple[int, int], tuple[str, int]] = {}
    constants = graph.model.graph.initializers
    for name in sorted(names, key=lambda name: (paths.position(name), name)):
        if name in shapes[0] and name in shapes[1] and name not in constants:
            for axis, pair in enumerate(zip(shapes[0][name], shapes[1][name], strict=False)):
                if pair[0] != pair[1]:
                    axes.setdefault(pair, (name, axis))
    return axes


def _rebuild(
    builder: Builder, node: ir.Node, pairs: list[tuple[int, int]], axes: dict[tuple[int, int], tuple[str, int]]
) -> None:
    attributes = node.attributes
    start = attributes["start"].as_int() if "start" in attributes else 0
    end = attributes["end"].as_int() if "end" in attributes else len(pairs)
    parts = [_size(builder, pair, axes) for pair in pairs[start:end]]
    if parts and all(parts):
        builder.op("Concat", *(part for part in parts if part), output=str(node.outputs[0].name), axis=0)


def _size(builder: Builder, pair: tuple[int, int], axes: dict[tuple[int, int], tuple[str, int]]) -> str | None:
    if pair[0] == pair[1]:
        return builder.ints(pair[0])
    if pair in axes:
        return builder.size_of(*axes[pair])
    for (first, second), place in axes.items():
        factor = pair[0] // max(first, 1)
        if factor > 1 and (first * factor, second * factor) == pair:
            return builder.op("Mul", builder.size_of(*place), builder.ints(factor))
    for (one, place), (two, other) in combinations(axes.items(), 2):
        if (one[0] + two[0], one[1] + two[1]) == pair:
            return builder.op("Add", builder.size_of(*place), builder.size_of(*other))
        if (one[0] * two[0], one[1] * two[1]) == pair:
            return builder.op("Mul", builder.size_of(*place), builder.size_of(*other))
    return None


def install(graph: OnnxGraph, builder: Builder, known: dict[str, ir.Value]) -> None:
    """Put the builder's nodes and constants into the graph; values of the same name are replaced.

    `known` holds the graph's values by name, and is kept up to date.
    """
    inner = graph.model.graph
    for name in builder.constants:
        inner.register_initializer(builder.value(name))
    made = [value for node in builder.nodes for value in node.outputs if value.name]
    replaced = [(value, known[str(value.name)]) for value in made if str(value.name) in known]
    known.update((str(value.name), value) for value in made)
    for value, old in replaced:
        value.type, value.shape = old.type or value.type, old.shape or value.shape
        old.name = f"{old.name}/replaced"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    inner.extend(builder.nodes)
