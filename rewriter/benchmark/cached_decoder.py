"""Small decoders with a key/value cache, written as Optimum lays them out: one graph without a past, one with it.

``llama``: rotary positions, grouped queries, RMS norms, gated feed-forward (Touvron et al. 2023). ``gpt2``: learned
positions, full heads with biases, layer norms (Radford et al. 2019). Inputs are input_ids, attention_mask and
past_key_values.N.key/value (B, heads, T, dim); outputs logits and present.N.key/value. Channels of the weights have
decaying sizes, as those of trained models do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from rewriter.benchmark.writer import Writer

PREFILL, WITH_PAST = "decoder_model.onnx", "decoder_with_past_model.onnx"
OPSET = 18


@dataclass(frozen=True)
class Shape:
    """A decoder with a cache: its kind, layers, model width, query heads, key heads, hidden width and vocabulary."""

    kind: Literal["llama", "gpt2"] = "llama"
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 128
    vocabulary: int = 96
    positions: int = 128

    @property
    def dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads


def write_folder(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Both graphs of one decoder with the same weights, in an existing folder."""
    for name, past in ((PREFILL, False), (WITH_PAST, True)):
        onnx.save(cached_decoder(shape, past, seed), folder / name)
    return folder


def cached_decoder(shape: Shape, past: bool, seed: int = 0) -> onnx.ModelProto:
    """One of both graphs; the same seed gives the same weights in both."""
    w = _Decoder(shape, past, seed)
    hidden = w.node("Gather", w.matrix("embed", shape.vocabulary, shape.width, 1.0), "input_ids", axis=0)
    if shape.kind == "gpt2":
        learned = w.matrix("positions", shape.positions, shape.width, 0.3)
        hidden = w.node("Add", hidden, w.node("Gather", learned, w.places, axis=0))
    for layer in range(shape.layers):
        w.prefix = f"layers.{layer}."
        hidden = w.node("Add", hidden, _attention(w, layer, _norm(w, hidden, "norm1")))
        hidden = w.node("Add", hidden, _feed_forward(w, _norm(w, hidden, "norm2")))
    w.prefix = ""
    head = w.matrix("head", shape.width, shape.vocabulary, shape.width**-0.5)
    w.node("MatMul", _norm(w, hidden, "norm"), head, output="logits")
    return w.model()


class _Decoder(Writer):
    """Named weights that depend on the seed and their name alone, and what all layers share."""

    def __init__(self, shape: Shape, past: bool, seed: int) -> None:
        super().__init__()
        self.shape, self.past, self.seed = shape, past, seed
        tokens = self._length("input_ids", 1)
        before = self._length("past_key_values.0.key", 2) if past else self.constant(np.array(0))
        self.total = self.node("Add", before, tokens)
        self.places = self.node("Range", before, self.total, self.constant(np.array(1)))
        self.mask = self._mask()
        self.tables = self._tables() if shape.kind == "llama" else ("", "")

    def matrix(self, hint: str, rows: int, columns: int, scale: float | None = None) -> str:
        """Random numbers whose directions have decaying sizes."""
        random = self._random(hint)
        strength = (0.97 ** np.arange(rows)) * 2.0 if scale is None else np.full(rows, scale)
        basis = np.linalg.qr(random.standard_normal((rows, rows)))[0] if scale is None else np.eye(rows)
        size = rows**-0.5 if scale is None else 1.0
        array = basis @ (random.standard_normal((rows, columns)) * strength[:, None]) * size
        return self.constant(array.astype(np.float32), f"{self.prefix}{hint}.weight")

    def vector(self, hint: str, size: int, middle: float) -> str:
        """Random numbers around one."""
        array = middle + 0.1 * self._random(hint).standard_normal(size)
        return self.constant(array.astype(np.float32), f"{self.prefix}{hint}")

    def model(self) -> onnx.ModelProto:
        """The finished graph."""
        cached = ("batch", self.shape.kv_heads, "past", self.shape.dim)
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", 1, ["batch", "tokens", self.shape.vocabulary])]
        for layer in range(self.shape.layers):
            for part in ("key", "value"):
                if self.past:
                    inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", 1, cached))
                sizes = ("batch", self.shape.kv_heads, "total", self.shape.dim)
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", 1, sizes))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def _random(self, hint: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *f"{self.prefix}{hint}".encode()])

    def _length(self, name: str, axis: int) -> str:
        return self.node("Gather", self.node("Shape", name), self.constant(np.array(axis)), axis=0)

    def _mask(self) -> str:
        """(B, 1, S, T): zero where attending is allowed."""
        keys = self.node("Range", self.constant(np.array(0)), self.total, self.constant(np.array(1)))
        rows, columns = self.node("Unsqueeze", self.places, self.ints(1)), self.node("Unsqueeze", keys, self.ints(0))
        valid = self.node("Cast", self.node("Unsqueeze", "attention_mask", self.ints(1, 2)), to=TensorProto.BOOL)
        allowed = self.node("And", self.node("LessOrEqual", columns, rows), valid)
        return self.node("Where", allowed, self.number(0.0), self.number(float(np.finfo(np.float32).min)))

    def _tables(self) -> tuple[str, str]:
        rates = 1e4 ** (-np.arange(0, self.shape.dim, 2, dtype=np.float32) / self.shape.dim)
        places = self.node("Unsqueeze", self.node("Cast", self.places, to=1), self.ints(1))
        angles = self.node("Mul", places, self.constant(rates[None]))
        both = self.node("Unsqueeze", self.node("Concat", angles, angles, axis=-1), self.ints(0, 1))
        return self.node("Cos", both), self.node("Sin", both)


def _norm(w: _Decoder, x: str, name: str) -> str:
    gain = w.vector(f"{name}.gain", w.shape.width, 1.0)
    if w.shape.kind == "gpt2":
        return w.node("LayerNormalization", x, gain, w.vector(f"{name}.bias", w.shape.width, 0.0), axis=-1)
    mean = w.node("ReduceMean", w.node("Pow", x, w.number(2.0)), w.ints(-1), keepdims=1)
    root = w.node("Sqrt", w.node("Add", mean, w.number(1e-5)))
    return w.node("Mul", gain, w.node("Mul", x, w.node("Reciprocal", root)))


def _linear(w: _Decoder, x: str, name: str, rows: int, columns: int) -> str:
    y = w.node("MatMul", x, w.matrix(name, rows, columns))
    return w.node("Add", y, w.vector(f"{name}.bias", columns, 0.0)) if w.shape.kind == "gpt2" else y


def _attention(w: _Decoder, layer: int, x: str) -> str:
    shape, dim = w.shape, w.shape.dim
    operands = []
    for name, heads in (("query", shape.heads), ("key", shape.kv_heads), ("value", shape.kv_heads)):
        flat = _linear(w, x, name, shape.width, heads * dim)
        split = w.node("Transpose", w.node("Reshape", flat, w.ints(0, 0, heads, dim)), perm=[0, 2, 1, 3])
        operands.append(_rotated(w, split) if shape.kind == "llama" and name != "value" else split)
    query = operands[0]
    key, value = (_cached(w, y, f"{layer}.{part}") for y, part in zip(operands[1:], ("key", "value"), strict=True))
    scores = w.node("MatMul", query, w.node("Transpose", _repeated(w, key), perm=[0, 1, 3, 2]))
    scaled = w.node("Add", w.node("Mul", scores, w.number(dim**-0.5)), w.mask)
    context = w.node("MatMul", w.node("Softmax", scaled, axis=-1), _repeated(w, value))
    merged = w.node("Reshape", w.node("Transpose", context, perm=[0, 2, 1, 3]), w.ints(0, 0, shape.width))
    return _linear(w, merged, "output", shape.width, shape.width)


def _cached(w: _Decoder, fresh: str, name: str) -> str:
    if w.past:
        return w.node("Concat", f"past_key_values.{name}", fresh, output=f"present.{name}", axis=2)
    return w.node("Identity", fresh, output=f"present.{name}")


def _rotated(w: _Decoder, x: str) -> str:
    half, cos_sin = w.shape.dim // 2, w.tables
    first = w.node("Slice", x, w.ints(0), w.ints(half), w.ints(3))
    second = w.node("Slice", x, w.ints(half), w.ints(2 * half), w.ints(3))
    turned = w.node("Concat", w.node("Neg", second), first, axis=-1)
    return w.node("Add", w.node("Mul", x, cos_sin[0]), w.node("Mul", turned, cos_sin[1]))


def _repeated(w: _Decoder, x: str) -> str:
    """Every key head once for each of its query heads."""
    group = w.shape.heads // w.shape.kv_heads
    if group == 1:
        return x
    shape = w.node("Shape", x)
    batch, tokens = (w.node("Slice", shape, w.ints(axis), w.ints(axis + 1)) for axis in (0, 2))
    spread = w.node("Concat", batch, w.ints(w.shape.kv_heads, group), tokens, w.ints(w.shape.dim), axis=0)
    merged = w.node("Concat", batch, w.ints(w.shape.heads), tokens, w.ints(w.shape.dim), axis=0)
    return w.node("Reshape", w.node("Expand", w.node("Unsqueeze", x, w.ints(2)), spread), merged)


def _feed_forward(w: _Decoder, x: str) -> str:
    shape = w.shape
    if shape.kind == "gpt2":
        up = _linear(w, x, "up", shape.width, shape.hidden)
        return _linear(w, w.node("Relu", up), "down", shape.hidden, shape.width)
    gate, up = (_linear(w, x, name, shape.width, shape.hidden) for name in ("gate", "up"))
    hidden = w.node("Mul", w.node("Mul", gate, w.node("Sigmoid", gate)), up)
    return _linear(w, hidden, "down", shape.hidden, shape.width)
