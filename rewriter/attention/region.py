"""What two sites must share for one to stand for the other: operators, attributes, constants, sizes — not weights."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.attention.lower import result_of
from rewriter.attention.trace import Trace, inputs_of
from rewriter.core.site import AttentionSite, FeedForwardSite, Projection, RaisedSite
from rewriter.graph.fingerprint import digest_attribute


class Regions:
    """Fingerprints of sites in one graph. Values made before a region count by how they are computed."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[str, str] = {}

    def fingerprint(self, site: RaisedSite) -> str:
        """Equal for sites whose regions differ in nothing but the numbers in weights, biases and gains."""
        result = result_of(site)
        sources = [name for name in dict.fromkeys(_sources(site)) if name]
        nodes: dict[int, ir.Node] = {}
        for source in sources:
            for node in self.trace.paths.between(source, result) or []:  # shape arithmetic included
                nodes[self.trace.paths.index[id(node)]] = node
        local = {name: f"source {i} {self._sizes(name)}" for i, name in enumerate(sources)}
        digest = hashlib.sha256(_description(site).encode())
        for _, node in sorted(nodes.items()):
            tokens = [local.get(name) or self._outside(name) for name in inputs_of(node)]
            digest.update(_node_digest(node, tokens).encode())
            for value in node.outputs:
                local[str(value.name)] = f"made {len(local)}"
        return digest.hexdigest()

    def _sizes(self, name: str) -> str:
        return str(self.trace.shape(name))

    def _outside(self, name: str) -> str:
        """How a value from outside the region is computed, by the graph before it."""
        stack = [name]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            node = self.trace.producer.get(current)
            before = [] if node is None else self.trace.paths.reads[id(node)]
            missing = [other for other in before if other not in self._known]
            if missing:
                stack += missing
                continue
            self._known[current] = self._token(current, node)
        return self._known[name]

    def _token(self, name: str, node: ir.Node | None) -> str:
        if not name:
            return "nothing"
        if node is not None:
            place = [value.name for value in node.outputs].index(name)
            return f"{_node_digest(node, [self._known.get(other, '') for other in inputs_of(node)])} {place}"
        if name in self.trace.inputs:
            return f"input {name}"
        constants = self.trace.graph.model.graph.initializers
        tensor = constants[name].const_value if name in constants else None
        if tensor is None or self.trace.drawn(name) or (len(tensor.shape) == 1 and tensor.size > 1):
            floating = tensor is None or tensor.dtype.is_floating_point()
            if floating:
                return f"weight {self._sizes(name)} {None if tensor is None else tensor.dtype}"
        assert tensor is not None
        content = np.ascontiguousarray(tensor.numpy())
        return f"constant {tensor.dtype} {content.shape} {hashlib.sha256(content.tobytes()).hexdigest()}"


def _node_digest(node: ir.Node, tokens: list[str]) -> str:
    digest = hashlib.sha256(f"{node.domain} {node.op_type} {node.overload} {len(node.outputs)}".encode())
    for name in sorted(node.attributes):
        digest_attribute(digest, node.attributes[name])
    digest.update("|".join(tokens).encode())
    return digest.hexdigest()


def _sources(site: RaisedSite) -> list[str]:
    if isinstance(site, FeedForwardSite):
        return [site.source]
    return [name for p in (site.query, site.key, site.value) for name in (p.source, p.opaque, p.past)]


def _description(site: RaisedSite) -> str:
    """What was read off the site, without names and numbers of weights."""
    if isinstance(site, FeedForwardSite):
        return repr((site.activation, site.gate_CF is None, site.up_CF.shape, site.rank, site.example_shape))
    assert isinstance(site, AttentionSite) and site.output is not None
    parts: list[Any] = [_projection(p) for p in (site.query, site.key, site.value)]
    parts += [site.heads, site.scale, site.softcap, site.bias.kind, site.bias.heads_axis, site.bias.folded]
    parts += [site.bias.logarithm, bool(site.bias.kept[1]), site.sink_H is None]
    parts += [site.empty_rows, site.mask, site.causal, site.position, site.cross, site.example_shape]
    parts += [site.output.rank, site.output.time_first, site.output.weight_HDC.shape, bool(site.escapes)]
    parts += [site.output.perm, site.output.bare]
    return repr(parts)


def _projection(p: Projection) -> tuple[Any, ...]:
    shape = None if p.weight_CGD is None else p.weight_CGD.shape
    norm = None if p.norm is None else (p.norm.kind, p.norm.epsilon, p.norm.gain_D.shape, p.norm.after_rotation)
    turn = None if p.rotary is None else (p.rotary.size, p.rotary.interleaved, p.rotary.sign, p.rotary.table_form)
    return shape, p.bias_GD is None, p.time_first, p.flatten, norm, turn, bool(p.past), bool(p.present), p.head_of
