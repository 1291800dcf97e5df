"""Sizes for dynamic axes, which may be named by formulas of other axes."""

from __future__ import annotations

import ast
from collections.abc import Mapping


class Sizes:
    """Sizes for dynamic axes, by name; axes named by a formula of others (``past + sequence``) are computed."""

    def __init__(self, chosen: Mapping[str, int]) -> None:
        self.chosen = dict(chosen)

    def of(self, axis: int | str | None, key: str) -> int:
        """The size of one axis; unnamed ones go by `key`."""
        if isinstance(axis, int):
            return axis
        name = axis or key
        if name in self.chosen:
            return self.chosen[name]
        found = _evaluate(name, self.chosen)
        return found if found is not None else self.chosen[key]


def _evaluate(formula: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a sum, difference or product of axis names; None if it is nothing of the kind."""
    try:
        return _number(ast.parse(formula, mode="eval").body, sizes)
    except (SyntaxError, KeyError, ValueError, RecursionError):
        return None


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)):
        left, right = _number(node.left, sizes), _number(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        return left * right if isinstance(node.op, ast.Mult) else left // max(right, 1)
    raise ValueError("no formula")
