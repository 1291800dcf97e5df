"""What is lowered: one graph at one set of shapes, as a straight list of nodes with every shape and dtype known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Value:
    """One tensor: shape and dtype, and its array if it is the same in every run."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    constant: NDArray[Any] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Value:
        """A constant."""
        return cls(name, tuple(int(size) for size in array.shape), array.dtype, array)


@dataclass(frozen=True)
class Node:
    """One operator. Omitted inputs and outputs have the empty name."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    opset: int = 1

    @property
    def key(self) -> str:
        """``domain:op``, or just the operator for the standard domain."""
        return f"{self.domain}:{self.op}" if self.domain else self.op

    def input(self, index: int) -> str:
        """The name of an input, empty when it is not given."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Program:
    """Nodes in an order in which they can run; `values` describes every name that occurs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: list[Node]
    values: dict[str, Value]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value."""
        return self.values[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of a value."""
        return self.values[name].dtype

    def constant(self, name: str) -> NDArray[Any] | None:
        """The array of a constant, else None (also for the empty name)."""
        return self.values[name].constant if name else None

    def producers(self) -> dict[str, Node]:
        """Which node makes a value."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    def uses(self) -> dict[str, int]:
        """How often each value is read; being a graph output counts."""
        counts: dict[str, int] = {}
        for name in self._reads():
            counts[name] = counts.get(name, 0) + 1
        return counts

    def _reads(self) -> Iterator[str]:
        yield from self.outputs
        for node in self.nodes:
            yield from (name for name in node.inputs if name)

    def prune(self) -> None:
        """Drop nodes whose results nobody reads."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(name for name in node.inputs if name)
        self.nodes = kept[::-1]
        needed.update(self.inputs, *(node.outputs for node in self.nodes))
        self.values = {name: value for name, value in self.values.items() if name in needed}
        for node in self.nodes:
            assert all(name in self.values for name in node.inputs if name)
