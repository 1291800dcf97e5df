"""The numbers a graph is looked at with: its own where they are few, drawn ones in place of large matrices.

What recognition claims about a region holds for any weights, so a model of billions of parameters is probed with
matrices that cost a vector of memory each: ``w[i, j] = line[i + 2 j]`` or ``line[2 i + j]``, which every transpose,
slice and split of a weight leaves a view and which multiply in N log N (`rewriter.graph.operators.linear`). A step of
two keeps square ones from being their own transpose, which would hide that mistake. Lookup tables stay as stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.attention.paths import Paths
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import TORCH_DTYPES, to_torch

LARGE = 2**16
UNUSUAL = 1e3  # mask constants and the like stay as they are
WEIGHT_INPUTS = {"MatMul": (0, 1), "FusedMatMul": (0, 1), "Gemm": (0, 1)}
VIEWED = frozenset(("Transpose", "Identity", "Cast", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"))


class Weights(Mapping[str, Tensor]):
    """Initialisers by name in float64, made when first asked for.

    Matrices of `large` elements or more that do nothing but multiply are drawn (`drawn` names them). With a `noise`
    seed all other floats carry noise, matrices 1.5 / sqrt(fan-in), vectors 0.2: default or pruned weights make checks
    vacuous (zero biases, dead branches, tiny logits).
    """

    def __init__(self, graph: OnnxGraph, paths: Paths, noise: int | None = None, large: int = LARGE) -> None:
        self.graph, self.paths, self.noise, self.large = graph, paths, noise, large
        self._values = graph.model.graph.initializers
        self._made: dict[str, Tensor] = {}
        self._outputs = {spec.name for spec in graph.outputs}
        self.drawn = {name for name, value in self._values.items() if self._is_drawn(name, value)}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            value = self._values[name]
            self._made[name] = self._draw(name, value) if name in self.drawn else self._load(name, value)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _is_drawn(self, name: str, value: ir.Value) -> bool:
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size < self.large:
            return False
        ordinary = tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
        return ordinary and self._multiplies(name)

    def _multiplies(self, name: str) -> bool:
        """Whether a value, by views at most, is only ever a factor of products (or a table beside that)."""
        if name in self._outputs:
            return False
        found, stack = False, [name]
        while stack:
            current = stack.pop()
            for node in self.paths.consumers[current]:
                position = [None if value is None else value.name for value in node.inputs].index(current)
                if position in WEIGHT_INPUTS.get(node.op_type, ()):
                    found = True
                elif node.op_type in VIEWED and position == 0:
                    stack += [str(value.name) for value in node.outputs]
                elif node.op_type != "Gather" or position != 0:
                    return False
        return found

    def _only_gathered(self, name: str) -> bool:
        nodes = self.paths.consumers[name]
        return (
            bool(nodes)
            and all(node.op_type == "Gather" and node.inputs[0] is not None for node in nodes)
            and all(node.inputs[0].name == name for node in nodes if node.inputs[0] is not None)
        )

    def _draw(self, name: str, value: ir.Value) -> Tensor:
        assert value.const_value is not None
        rows, columns = (int(size) for size in value.const_value.shape.numpy())
        random = np.random.default_rng((zlib.crc32(name.encode()), self.noise or 0))
        down, across = (1, 2) if columns <= rows else (2, 1)  # the shorter vector
        line = torch.from_numpy(random.standard_normal(down * (rows - 1) + across * (columns - 1) + 1) / np.sqrt(rows))
        return line.as_strided((rows, columns), (down, across))

    def _load(self, name: str, value: ir.Value) -> Tensor:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size >= self.large and array.dtype.kind in "fV" and self._only_gathered(name):
            return to_torch(array)  # a few rows of it are read; the interpreter widens those
        tensor = to_torch(array, torch.float64)
        if self.noise is None or not tensor.is_floating_point() or tensor.numel() < 2:
            return tensor
        # rounded to what the model can store, so that sites hold the very same numbers
        stored = TORCH_DTYPES.get(value.dtype, torch.float32) if value.dtype is not None else torch.float32
        random = np.random.default_rng((zlib.crc32(name.encode()), self.noise))
        return _shake(tensor, random).to(stored).to(torch.float64)


class Borrowed(Mapping[str, Tensor]):
    """The constants of an edited graph: those it shares with the original as `weights` has them, its own in float64."""

    def __init__(self, graph: OnnxGraph, weights: Mapping[str, Tensor]) -> None:
        self._values, self._weights = graph.model.graph.initializers, weights

    def __getitem__(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name]
        tensor = self._values[name].const_value
        assert tensor is not None
        return to_torch(tensor.numpy(), torch.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _shake(tensor: Tensor, random: np.random.Generator) -> Tensor:
    # whichever axes are summed over: activations must not grow until softmax saturates, for then no change shows
    size = 1.5 / np.sqrt(max(tensor.shape[0], tensor.numel() // tensor.shape[0])) if tensor.ndim > 1 else 0.2
    noise = torch.from_numpy(random.standard_normal(tuple(tensor.shape), dtype=np.float32)).to(tensor.dtype) * size
    moved = tensor + noise
    if bool((tensor > 0).all()):  # variances and tables of sizes stay positive
        moved = moved.abs() + 1e-3
    return torch.where(torch.isfinite(tensor) & (tensor.abs() < UNUSUAL), moved, tensor)
