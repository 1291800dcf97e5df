"""Writes nodes on top of a graph: standard operators and composites, every value named under one prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.core.site import Array
from rewriter.graph.composites import composite


class Builder:
    """Collects nodes and constants; `lookup` gives the values of the graph that the nodes read.

    Float64 constants are rounded to `dtype`; without one they stay, for checks in float64. `old_caches` says that what
    the graph holds in caches has the sizes from before a rewrite.
    """

    def __init__(
        self,
        prefix: str,
        opset: int,
        lookup: Callable[[str], ir.Value],
        dtype: np.dtype[np.generic] | None = None,
        old_caches: bool = False,
    ) -> None:
        self.prefix, self.opset, self._lookup, self.dtype = prefix, opset, lookup, dtype
        self.old_caches = old_caches
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, Array] = {}
        self._values: dict[str, ir.Value] = {}
        self._count = 0

    @property
    def lowest(self) -> float:
        """The most negative finite number of the dtype that constants are rounded to."""
        return -65504.0 if self.dtype == np.float16 else float(np.finfo(np.float32).min)

    def name(self, hint: str) -> str:
        """A fresh name under the prefix."""
        self._count += 1
        return f"{self.prefix}/{hint}_{self._count}"

    def value(self, name: str) -> ir.Value:
        """A value by name: one made here, or one of the graph."""
        if name not in self._values:
            self._values[name] = self._lookup(name)
        return self._values[name]

    def constant(self, array: Array, name: str = "") -> str:
        """A constant of the new nodes."""
        name = f"{self.prefix}/{name}" if name else self.name("constant")
        if self.dtype is not None and array.dtype == np.float64:
            array = array.astype(self.dtype)
        # for checks alone, a view of a large matrix must not become a copy
        self.constants[name] = np.asarray(array, order="C") if self.dtype is not None else array
        self._values[name] = ir.Value(name=name, const_value=ir.Tensor(self.constants[name], name=name))
        return name

    def ints(self, *numbers: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(numbers, np.int64))

    def op(self, kind: str, /, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A standard operator; returns the name of its output."""
        output = output or self.name(kind.lower())
        made = ir.Node(
            "",
            kind,
            [self.value(name) if name else None for name in inputs],
            ir.convenience.convert_attributes(attributes),
            outputs=[ir.Value(name=output)],
            name=output,
        )
        return self._add(made)

    def split(self, name: str, sizes: Sequence[int], outputs: Sequence[str]) -> None:
        """Parts of the last axis under the given names; before opset 13 the sizes are an attribute."""
        inputs, attributes = [self.value(name)], {"axis": -1}
        if self.opset >= 13:
            inputs.append(self.value(self.ints(*sizes)))
        made = ir.Node(
            "",
            "Split",
            inputs,
            ir.convenience.convert_attributes(attributes if self.opset >= 13 else attributes | {"split": list(sizes)}),
            outputs=[ir.Value(name=output) for output in outputs],
            name=outputs[0],
        )
        self._add(made)

    def composite(self, operator: str, /, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A composite operator; returns the name of its output."""
        output = output or self.name(operator.lower())
        return self._add(
            composite(operator, [self.value(name) if name else None for name in inputs], output, **attributes)
        )

    def copy(self, nodes: Iterable[ir.Node], renamed: dict[str, str]) -> None:
        """The same nodes again with other inputs; `renamed` gains the new names of their outputs."""
        for node in nodes:
            outputs = []
            for value in node.outputs:
                if not value.name:
                    outputs.append(ir.Value(name=""))
                    continue
                renamed[value.name] = self.name("copy")
                outputs.append(ir.Value(name=renamed[value.name], type=value.type))
            inputs = [None if v is None else self.value(renamed.get(str(v.name), str(v.name))) for v in node.inputs]
            attributes = list(node.attributes.values())
            made = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                attributes,
                outputs=outputs,
                version=node.version,
                name=self.name("node"),
            )
            self._add(made)

    def declare(self, name: str, *sizes: int | None, dtype: np.dtype[np.generic] | None = None) -> str:
        """Say what is known of a value's shape, and that it holds floats (the graph's, or of `dtype`): backends ask."""
        value = self.value(name)
        value.shape = ir.Shape(sizes)
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype or self.dtype or np.float32)))
        return name

    def size_of(self, name: str, axis: int) -> str:
        """One axis of a value's shape, as a vector of one number."""
        return self.op("Slice", self.op("Shape", name), self.ints(axis), self.ints(axis + 1))

    def joined(self, parts: Sequence[str]) -> str:
        """Vectors one after the other."""
        return self.op("Concat", *parts, axis=0)

    def unsqueeze(self, name: str, *axes: int) -> str:
        """New axes of length one; before opset 13 the axes are an attribute."""
        if self.opset >= 13:
            return self.op("Unsqueeze", name, self.ints(*axes))
        return self.op("Unsqueeze", name, axes=list(axes))

    def _add(self, node: ir.Node) -> str:
        self.nodes.append(node)
        for value in node.outputs:
            if value.name:
                self._values[value.name] = value
        return str(node.outputs[0].name)
