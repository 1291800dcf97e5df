"""Nodes and small constants of an ONNX graph that is written by hand, under names made as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Writer:
    """Collects nodes and constants; `prefix` begins the names of nodes."""

    def __init__(self) -> None:
        self.prefix = ""
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []

    def node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A standard operator; returns the name of its output."""
        output = output or f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """A constant."""
        name = name or f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *numbers: int) -> str:
        """A vector of int64."""
        return self.constant(np.array(numbers, np.int64))

    def number(self, value: float) -> str:
        """A float32."""
        return self.constant(np.array(value, np.float32))
