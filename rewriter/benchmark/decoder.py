"""Writes decoders of any size as ONNX with external data, spelled as exporters spell them: something to inspect.

Grouped queries, rotary positions, RMS norms, gated feed-forward, causal mask plus padding (Touvron et al. 2023).
Weights are random numbers written straight to the file, so that no model ever has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from rewriter.benchmark.writer import Writer

_BLOCK = 2**22  # random numbers, written again and again


@dataclass(frozen=True)
class Sizes:
    """A decoder: layers, model width, query heads, key heads, hidden width of the feed-forward, vocabulary."""

    layers: int
    width: int = 1536
    heads: int = 12
    kv_heads: int = 4
    hidden: int = 4608
    vocabulary: int = 32000

    @property
    def dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Numbers stored in matrices."""
        kv = self.kv_heads * self.dim
        return self.layers * self.width * (2 * self.width + 2 * kv + 3 * self.hidden) + 2 * self.vocabulary * self.width


def write_decoder(path: Path, sizes: Sizes, seed: int = 0) -> Path:
    """Write ``path`` and ``path.data``; inputs are input_ids and attention_mask, both (batch, tokens) int64."""
    writer = _Writer(path.with_name(path.name + ".data"), seed)
    hidden = writer.node("Gather", writer.matrix("embed", sizes.vocabulary, sizes.width), "input_ids")
    mask, cos, sin = _mask(writer), *_tables(writer, sizes)
    for layer in range(sizes.layers):
        writer.prefix = f"layers.{layer}."
        hidden = writer.node(
            "Add", hidden, _attention(writer, sizes, _norm(writer, hidden, sizes.width), mask, cos, sin)
        )
        hidden = writer.node("Add", hidden, _feed_forward(writer, sizes, _norm(writer, hidden, sizes.width)))
    writer.prefix = ""
    last = _norm(writer, hidden, sizes.width)
    writer.node("MatMul", last, writer.matrix("head", sizes.width, sizes.vocabulary), output="logits")
    writer.save(path, sizes.vocabulary)
    return path


def _norm(w: _Writer, x: str, width: int) -> str:
    mean = w.node("ReduceMean", w.node("Pow", x, w.number(2.0)), w.ints(-1), keepdims=1)
    root = w.node("Sqrt", w.node("Add", mean, w.number(1e-5)))
    return w.node("Mul", w.vector("gain", width), w.node("Mul", x, w.node("Reciprocal", root)))


def _mask(w: _Writer) -> str:
    """(B, 1, S, S): zero where attending is allowed."""
    tokens = w.node("Gather", w.node("Shape", "input_ids"), w.constant(np.array(1)), axis=0)
    steps = w.node("Range", w.constant(np.array(0)), tokens, w.constant(np.array(1)))
    row = w.node("Unsqueeze", steps, w.ints(1))
    causal = w.node("LessOrEqual", w.node("Unsqueeze", steps, w.ints(0)), row)
    valid = w.node("Cast", w.node("Unsqueeze", "attention_mask", w.ints(1, 2)), to=TensorProto.BOOL)
    lowest = w.constant(np.array(np.finfo(np.float32).min, np.float32))
    return w.node("Where", w.node("And", causal, valid), w.number(0.0), lowest)


def _tables(w: _Writer, sizes: Sizes) -> tuple[str, str]:
    tokens = w.node("Gather", w.node("Shape", "input_ids"), w.constant(np.array(1)), axis=0)
    steps = w.node("Range", w.constant(np.array(0)), tokens, w.constant(np.array(1)))
    rates = 1e4 ** (-np.arange(0, sizes.dim, 2, dtype=np.float32) / sizes.dim)
    angles = w.node("Mul", w.node("Unsqueeze", w.node("Cast", steps, to=1), w.ints(1)), w.constant(rates[None]))
    both = w.node("Unsqueeze", w.node("Concat", angles, angles, axis=-1), w.ints(0, 1))
    return w.node("Cos", both), w.node("Sin", both)


def _attention(w: _Writer, sizes: Sizes, x: str, mask: str, cos: str, sin: str) -> str:
    kv, dim = sizes.kv_heads * sizes.dim, sizes.dim
    operands = []
    for name, heads in (("query", sizes.heads), ("key", sizes.kv_heads), ("value", sizes.kv_heads)):
        flat = w.node("MatMul", x, w.matrix(name, sizes.width, sizes.width if name == "query" else kv))
        operands.append(w.node("Transpose", w.node("Reshape", flat, w.ints(0, 0, heads, dim)), perm=[0, 2, 1, 3]))
    query, key = (_rotated(w, y, cos, sin, dim) for y in operands[:2])
    key, value = (_repeated(w, y, sizes) for y in (key, operands[2]))
    scores = w.node("MatMul", query, w.node("Transpose", key, perm=[0, 1, 3, 2]))
    scaled = w.node("Add", w.node("Mul", scores, w.number(dim**-0.5)), mask)
    context = w.node("MatMul", w.node("Softmax", scaled, axis=-1), value)
    merged = w.node("Reshape", w.node("Transpose", context, perm=[0, 2, 1, 3]), w.ints(0, 0, sizes.width))
    return w.node("MatMul", merged, w.matrix("output", sizes.width, sizes.width))


def _rotated(w: _Writer, x: str, cos: str, sin: str, dim: int) -> str:
    first = w.node("Slice", x, w.ints(0), w.ints(dim // 2), w.ints(3))
    second = w.node("Slice", x, w.ints(dim // 2), w.ints(dim), w.ints(3))
    turned = w.node("Concat", w.node("Neg", second), first, axis=-1)
    return w.node("Add", w.node("Mul", x, cos), w.node("Mul", turned, sin))


def _repeated(w: _Writer, x: str, sizes: Sizes) -> str:
    """Every key head once for each of its query heads."""
    shape = w.node("Shape", x)
    batch, tokens = (w.node("Slice", shape, w.ints(axis), w.ints(axis + 1)) for axis in (0, 2))
    group = sizes.heads // sizes.kv_heads
    spread = w.node("Concat", batch, w.ints(sizes.kv_heads, group), tokens, w.ints(sizes.dim), axis=0)
    merged = w.node("Concat", batch, w.ints(sizes.heads), tokens, w.ints(sizes.dim), axis=0)
    return w.node("Reshape", w.node("Expand", w.node("Unsqueeze", x, w.ints(2)), spread), merged)


def _feed_forward(w: _Writer, sizes: Sizes, x: str) -> str:
    gate = w.node("MatMul", x, w.matrix("gate", sizes.width, sizes.hidden))
    up = w.node("MatMul", x, w.matrix("up", sizes.width, sizes.hidden))
    hidden = w.node("Mul", w.node("Mul", gate, w.node("Sigmoid", gate)), up)
    return w.node("MatMul", hidden, w.matrix("down", sizes.hidden, sizes.width))


class _Writer(Writer):
    """Matrices go to the data file as they are named."""

    def __init__(self, data: Path, seed: int) -> None:
        super().__init__()
        self._numbers = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32).tobytes()
        self._data, self._offset = data, 0
        data.unlink(missing_ok=True)
        data.touch()

    def vector(self, hint: str, size: int) -> str:
        random = np.random.default_rng(len(self.tensors))
        return self.constant((1.0 + 0.1 * random.standard_normal(size)).astype(np.float32))

    def matrix(self, hint: str, rows: int, columns: int) -> str:
        name, length = f"{self.prefix}{hint}.weight", rows * columns * 4
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data.name), ("offset", self._offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        with self._data.open("ab") as file:
            for start in range(0, length, len(self._numbers)):
                file.write(self._numbers[: min(len(self._numbers), length - start)])
        self._offset += length
        self.tensors.append(tensor)
        return name

    def save(self, path: Path, vocabulary: int) -> None:
        sizes: Sequence[str | int] = ("batch", "tokens")
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, sizes) for n in ("input_ids", "attention_mask")]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*sizes, vocabulary])]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        path.write_bytes(model.SerializeToString())
