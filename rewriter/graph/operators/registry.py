"""The one table of operators: name and domain to torch code, by the opset in which the meaning began."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.core.errors import ModelError, UnsupportedOperator
from rewriter.graph.tensors import to_torch, torch_dtype

Environment = dict[str, Tensor]
Result = Tensor | tuple[Tensor | None, ...] | list[Tensor]
Function = Callable[..., Result]
MAX_NEW_ELEMENTS = 2**33


@dataclass(frozen=True)
class Call:
    """What an operator may know besides its inputs: its attributes, opset, number of outputs, forced float dtype.

    `run_graph` evaluates a subgraph (control flow only) in an environment and returns its outputs.
    """

    node: ir.Node
    attributes: Mapping[str, Any]
    opset: int
    upcast: torch.dtype | None
    run_graph: Callable[[ir.Graph, Environment], list[Tensor]]

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value, strings as `str`."""
        return self.attributes.get(name, default)

    def need(self, name: str) -> Any:
        """An attribute that must be there."""
        if name not in self.attributes:
            raise ModelError(f"operator {self.node.op_type} lacks its attribute {name!r}", "Export the model again")
        return self.attributes[name]

    def dtype(self, kind: int) -> torch.dtype:
        """The torch dtype of an ONNX dtype number, with floats raised to the forced one."""
        dtype = torch_dtype(kind)
        return self.upcast if self.upcast is not None and dtype.is_floating_point else dtype

    def tensor(self, name: str) -> Tensor | None:
        """A tensor attribute."""
        value = self.attributes.get(name)
        return None if value is None else to_torch(value.numpy(), self.upcast)

    @property
    def outputs(self) -> int:
        """How many outputs the node lists."""
        return len(self.node.outputs)

    def wants(self, index: int) -> bool:
        """Whether output `index` is asked for."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def unsupported(self, detail: str) -> UnsupportedOperator:
        """The error for a form of the operator this engine does not run."""
        return unsupported(self.node, detail)


@dataclass(frozen=True)
class Implementation:
    """`function(call, *inputs)`; with `scoped`, `function(call, environment, *inputs)`."""

    since: int
    function: Function
    scoped: bool = False


_TABLE: dict[tuple[str, str], list[Implementation]] = {}


def operator(*names: str, domain: str = "", since: int = 1, scoped: bool = False) -> Callable[[Function], Function]:
    """Register an implementation under one or more names, valid from opset `since` until a later one begins."""

    def register(function: Function) -> Function:
        for name in names:
            versions = _TABLE.setdefault((domain, name), [])
            versions.append(Implementation(since, function, scoped))
            versions.sort(key=lambda entry: entry.since)
        return function

    return register


def find(node: ir.Node, opset: int) -> Implementation:
    """The implementation valid for a node at an opset; raises `UnsupportedOperator`."""
    versions = [entry for entry in _TABLE.get((node.domain, node.op_type), []) if entry.since <= opset]
    if not versions:
        raise unsupported(node, f"opset {opset}" if not node.domain else "")
    return versions[-1]


def known(node: ir.Node) -> bool:
    """Whether any version of the operator is implemented."""
    return (node.domain, node.op_type) in _TABLE


def names() -> list[tuple[str, str]]:
    """All (domain, operator) pairs, sorted."""
    return sorted(_TABLE)


def unsupported(node: ir.Node, detail: str = "") -> UnsupportedOperator:
    """The error that names a node and its operator."""
    operator_name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    label = node.name or next((value.name for value in node.outputs if value.name), "")
    return UnsupportedOperator("the interpreter", operator_name, label or "", detail)


def decode(attributes: Mapping[str, ir.Attr]) -> dict[str, Any]:
    """Attribute values as plain Python: numbers, strings, lists, `onnx_ir` tensors and graphs."""
    values: dict[str, Any] = {}
    for name, attribute in attributes.items():
        value = attribute.value
        if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
            value = list(attribute.value)
        elif isinstance(value, bytes):
            value = value.decode(errors="replace")
        values[name] = value
    return values


def ints(tensor: Tensor) -> list[int]:
    """A small integer tensor as Python numbers."""
    return [int(item) for item in tensor.reshape(-1).tolist()]


def sized(shape: list[int]) -> list[int]:
    """`shape` itself, refused with `ModelError` when no honest model would ask for that much memory at once."""
    count = 1
    for size in shape:
        count *= size
    if count > MAX_NEW_ELEMENTS or any(size < 0 for size in shape):
        raise ModelError(f"the model asks for a tensor of shape {shape}", "Check the input shapes and the model")
    return shape
