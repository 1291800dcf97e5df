"""How operators enter the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.program import Node

Lower = Callable[[Lowering, Node], Any]
TABLE: dict[str, Lower] = {}


def lowers(*keys: str) -> Callable[[Lower], Lower]:
    """Enter a function into the table under these keys."""

    def register(function: Lower) -> Lower:
        for key in keys:
            assert key not in TABLE, f"{key} is lowered twice"
            TABLE[key] = function
        return function

    return register


def integers(value: Any) -> list[int]:
    """Plain ints of an attribute or array."""
    return [int(item) for item in value]
