"""A chain of copies of one sub-block: what an option is timed in.

A sub-block alone in a loop keeps its weights warm and knows no neighbours. A chain of copies, each with weights of its
own, joined by the residual addition and the norm that surround a sub-block in a Transformer, is timed as a whole; the
latency of one copy is that of the chain divided by the copies, and the difference between two options is what one copy
of the model would save.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.attention.lower import result_of
from rewriter.core.site import AttentionSite, FeedForwardSite, LinearSite, Projection, Site
from rewriter.graph.composites import COMPOSITE_DOMAIN
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Fragment

Values = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Chain:
    """A graph of `copies` sub-blocks with feeds for all its inputs."""

    graph: OnnxGraph
    feeds: dict[str, NDArray[Any]]
    copies: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs."""
        return {name: tuple(array.shape) for name, array in self.feeds.items()}


def signature(site: Site, piece: Fragment, values: Values) -> str:
    """What the latency of a sub-block depends on, as text: sizes, structure and dtypes, never weights or names."""
    reads = [[list(values[name].shape), str(values[name].dtype)] for name in piece.reads()]
    facts: dict[str, Any] = {"reads": sorted(map(json.dumps, reads)), "precision": site.precision}
    if isinstance(site, AttentionSite):
        facts |= {
            "kind": "attention",
            "operands": [_operand_facts(p) for p in (site.query, site.key, site.value)],
            "output": [] if site.output is None else [*site.output.weight_HDC.shape, site.output.bias_C is not None],
            "bias": [site.bias.kind, site.bias.heads_axis, *([site.bias.window] if site.bias.window else [])],
            "softcap": bool(site.softcap),
            **({"packing": site.packing} if site.packing else {}),
            **({"forms": list(site.forms)} if site.forms else {}),
            "empty_rows": site.empty_rows,
            "extras": [bool(site.bias.kept[1]), site.sink_H is not None],
        }
    elif isinstance(site, LinearSite):
        facts |= {
            "kind": "linear",
            "operands": [_operand_facts(site.inner)],
            "output": [*site.output.weight_HDC.shape, site.output.bias_C is not None],
        }
    else:
        facts |= {
            "kind": "feed_forward",
            "sizes": [*site.up_CF.shape, site.down_FC.shape[1]],
            "activation": site.activation,
            "gated": site.gate_CF is not None,
            "biases": [b is not None for b in (site.up_bias_F, site.gate_bias_F, site.down_bias_C)],
        }
    return json.dumps(facts, sort_keys=True)


def _operand_facts(operand: Projection) -> list[Any]:
    weight = operand.weight_CGD
    shape = [operand.heads, operand.dim] if weight is None else list(weight.shape)
    extras: list[int] = [
        operand.bias_GD is not None,
        operand.norm is not None,
        operand.rotary is not None,
        bool(operand.past),
    ]
    if operand.rotary is not None and operand.rotary.keep:
        extras += [operand.rotary.size, len(set(operand.rotary.keep))]
    return [*shape, *extras, list(operand.head_of)]


def build_chain(graph: OnnxGraph, site: Site, piece: Fragment, values: Values, copies: int = 8) -> Chain:
    """A chain of `copies` of the site, whose fragment is `piece`. `values` holds what it reads, at the shapes to time.

    Where source and result differ in shape (cross attention over another width, say) the copies stand side by side
    instead of in a row. Weights differ between copies, so that no two share cache lines.
    """
    builder = _ChainBuilder(piece, values)
    source = _source(site)
    result = result_of(site)
    in_a_row = bool(source) and values[source].ndim == 3 and builder.result_width(site) == values[source].shape[-1]
    current = builder.input(source) if source else None
    outputs = []
    for copy in range(copies):
        made = builder.copy(copy, {source: current} if current is not None else {}, result)
        if in_a_row and current is not None:
            current = builder.join(copy, current, made, int(values[source].shape[-1]))
        else:
            outputs.append(made)
    return Chain(builder.graph(outputs or [current], graph), builder.feeds(), copies)


def _source(site: Site) -> str:
    """The value that a copy takes from the copy before it."""
    if isinstance(site, FeedForwardSite):
        return site.source
    return site.inner.source if isinstance(site, LinearSite) else site.query.source


class _ChainBuilder:
    """Collects the renamed copies of a fragment into one new graph."""

    def __init__(self, piece: Fragment, values: Values) -> None:
        self.piece, self.values = piece, values
        self.inputs: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    @staticmethod
    def result_width(site: Site) -> int:
        if not isinstance(site, FeedForwardSite):
            return -1 if site.output is None or site.output.rank != 3 else int(site.output.weight_HDC.shape[2])
        return int(site.down_FC.shape[1])

    def input(self, name: str) -> ir.Value:
        if name not in self.inputs:
            array = self.values[name]
            self.inputs[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
            )
        return self.inputs[name]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(np.ascontiguousarray(array), name=name),
        )
        self.initializers.append(value)
        return value

    def copy(self, index: int, replaced: Mapping[str, ir.Value | None], result: str) -> ir.Value:
        """One copy of the fragment reading `replaced` values; returns its result."""
        known: dict[str, ir.Value] = {name: value for name, value in replaced.items() if value is not None}
        for name, array in self.piece.constants.items():
            # A hair of difference per copy: same distribution, other memory.
            own = array * np.asarray(1 + 1e-3 * index, array.dtype) if array.dtype.kind == "f" else array
            known[name] = self.constant(f"copy{index}/{name}", own)
        for node in self.piece.nodes:
            sources = [
                None if v is None or not v.name else known.get(v.name) or self.input(v.name) for v in node.inputs
            ]
            made = [ir.Value(name=f"copy{index}/{v.name}") for v in node.outputs]
            fresh = ir.Node(
                node.domain,
                node.op_type,
                sources,
                node.attributes.values(),
                outputs=made,
                name=f"copy{index}/{made[0].name}",
            )
            self.nodes.append(fresh)
            known.update({v.name: new for v, new in zip(node.outputs, made, strict=True) if v.name})
        return known[result]

    def join(self, index: int, before: ir.Value, made: ir.Value, width: int) -> ir.Value:
        """Residual addition and norm around a sub-block."""
        total, normed = ir.Value(name=f"join{index}/sum"), ir.Value(name=f"join{index}/norm")
        dtype = np.dtype(np.float32) if before.dtype is None else before.dtype.numpy()
        gain = self.constant(f"join{index}/gain", np.ones(width, dtype))
        shift = self.constant(f"join{index}/shift", np.zeros(width, dtype))
        self.nodes.append(ir.Node("", "Add", [before, made], outputs=[total]))
        attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", 1e-5)]
        self.nodes.append(ir.Node("", "LayerNormalization", [total, gain, shift], attributes, outputs=[normed]))
        return normed

    def graph(self, outputs: Sequence[ir.Value | None], like: OnnxGraph) -> OnnxGraph:
        kept = [value for value in outputs if value is not None]
        graph = ir.Graph(
            list(self.inputs.values()), kept, nodes=self.nodes, initializers=self.initializers,
            opset_imports={"": max(17, like.opset), COMPOSITE_DOMAIN: 1}, name="chain",
        )  # fmt: skip
        return OnnxGraph(ir.Model(graph, ir_version=10))

    def feeds(self) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(self.values[name]) for name in self.inputs}
