"""A tiny encoder written with composites, and single standard nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import Node, Value

from rewriter.graph.composites import composite
from rewriter.graph.onnx import OnnxGraph
from tests.runtimes.composite_graphs import constant, graph_of, tensor_input
from tests.runtimes.tvm.harness import numbers

FLOAT = ir.DataType.FLOAT


def node(op: str, inputs: list[Value | None], output: str, **attributes: object) -> Node:
    made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), outputs=[ir.Value(name=output)])
    made.outputs[0].type = ir.TensorType(FLOAT)
    return made


class Encoder:
    """Embedding, one attention and one feed-forward block with residual norms; odd sizes on purpose."""

    def __init__(
        self,
        width: int = 40,
        heads: int = 2,
        hidden: int = 52,
        words: int = 50,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        self.precision = precision
        self.heads, self.nodes, self.constants, self.seed = heads, [], {}, seed
        ids = tensor_input("ids", np.int64, ("batch", "tokens"))
        bias = tensor_input("bias", np.float32, ("batch", 1, 1, "tokens"))
        x = self.add(node("Gather", [self.weight("table", words, width), ids], "embedded"))
        qkv = [self.linear(x, f"{role}", width, width) for role in ("query", "key", "value")]
        picks = {f"{role}_heads": heads for role in ("query", "key", "value")}
        maps = {f"{role}_head_of": list(range(heads)) for role in ("query", "key", "value")}
        scale = (width // heads) ** -0.5
        core = composite(
            "Attention", [*qkv, bias], "features", FLOAT, heads=heads, scale=scale, bias_kind="add", **picks, **maps
        )
        x = self.block(x, self.linear(self.add(core), "out", width, width), "norm1", width)
        up = self.linear(x, "up", width, hidden, "gelu")
        x = self.block(x, self.linear(up, "down", hidden, width), "norm2", width)
        x.shape = ir.Shape(["batch", "tokens", width])
        self.graph = graph_of(self.nodes, [ids, bias], self.constants, 20)

    def weight(self, name: str, *shape: int) -> Value:
        self.constants[name] = numbers(*shape, seed=self.seed + len(self.constants)) * np.float32(shape[0] ** -0.5)
        return constant(name, self.constants[name])

    def add(self, made: Node) -> Value:
        self.nodes.append(made)
        return made.outputs[0]

    def linear(self, x: Value, name: str, columns: int, rows: int, activation: str = "") -> Value:
        inputs = [x, self.weight(f"{name}.weight", columns, rows), self.weight(f"{name}.bias", rows)]
        rounding = {} if self.precision == "fp32" else {"precision": self.precision}
        return self.add(composite("Linear", inputs, name, FLOAT, activation=activation, **rounding))

    def block(self, x: Value, change: Value, name: str, width: int) -> Value:
        total = self.add(node("Add", [x, change], f"{name}.sum"))
        gain, shift = self.weight(f"{name}.gain", width), self.weight(f"{name}.shift", width)
        return self.add(node("LayerNormalization", [total, gain, shift], name, axis=-1, epsilon=1e-6))


def encoder(seed: int = 0) -> OnnxGraph:
    return Encoder(seed=seed).graph


def feeds(batch: int = 1, tokens: int = 11, valid: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bias = np.zeros((batch, 1, 1, tokens), np.float32)
    bias[..., tokens if valid is None else valid :] = np.finfo(np.float32).min
    return {"ids": rng.integers(0, 50, (batch, tokens)), "bias": bias}
