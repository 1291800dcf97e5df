"""Functions in an ONNX message: none calls itself, and written out they stay of a size that can be handled."""

from __future__ import annotations

from pathlib import Path

import onnx

from rewriter.core.errors import ModelError
from rewriter.graph.proto_walk import nodes_within

MOST_NODES = 5_000_000
Name = tuple[str, str]


def check_functions(proto: onnx.ModelProto, file: Path) -> None:
    """Raise `ModelError` for functions that call themselves, or that grow beyond all measure when written out."""
    if not proto.functions:
        return
    calls = {_name(function.domain, function.name): _called(list(function.node)) for function in proto.functions}
    sizes: dict[Name, int] = {}
    for start in calls:
        _measure(start, calls, sizes, file)
    total = sum(sizes.get(name, 1) for name in _called(list(proto.graph.node)))
    if total > MOST_NODES:
        raise ModelError(f"{file}: written out, its functions make {total} nodes", "Export the model again")


def _measure(start: Name, calls: dict[Name, list[Name]], sizes: dict[Name, int], file: Path) -> None:
    """Sizes of a function and of all that it calls, without recursion: files may nest them as deep as they like."""
    stack, open_ = [start], set[Name]()
    while stack:
        name = stack[-1]
        missing = [other for other in calls[name] if other in calls and other not in sizes]
        if name in sizes or not missing:
            sizes.setdefault(name, sum(sizes.get(other, 1) for other in calls[name]))
            open_.discard(stack.pop())
        elif name in open_:
            raise ModelError(f"{file}: the function {'::'.join(name)} calls itself", "Export the model again")
        else:
            open_.add(name)
            stack += missing


def _called(nodes: list[onnx.NodeProto]) -> list[Name]:
    return [_name(node.domain, node.op_type) for node in nodes_within(nodes)]


def _name(domain: str, name: str) -> Name:
    return "" if domain == "ai.onnx" else domain, name
