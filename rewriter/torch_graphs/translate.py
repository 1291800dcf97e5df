"""Writes the lowered form of one site as fx nodes: composites as torch calls, what lies around them as views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

import rewriter.torch_graphs.views  # noqa: F401  (registers how views are written)
from rewriter.core.refusal import Refused
from rewriter.graph.composites import is_composite
from rewriter.graph.onnx import constant_of
from rewriter.torch_graphs.bridge import parameter_names
from rewriter.torch_graphs.composites import write_composite
from rewriter.torch_graphs.glue import WRITERS
from rewriter.torch_graphs.matching import Matches
from rewriter.torch_graphs.parameters import Origin, Parameters
from rewriter.torch_graphs.terms import Constant, Term, constant

Current = Callable[[fx.Node], fx.Node]


class Translator:
    """Nodes of one site's fragment, and of the ONNX graph around it where a value has no fx node of its own.

    `current` gives the node that stands for one of the host now; only nodes before `end` may be read. `values` are the
    values of the fragment in one run, which tell ranks, widths and dtypes. New nodes go to the graph's insert point.
    """

    def __init__(
        self,
        graph: fx.Graph,
        matches: Matches,
        parameters: Parameters,
        current: Current,
        end: int,
        values: Mapping[str, Tensor],
        origins: Mapping[str, Origin],
        causal: bool = False,
    ) -> None:
        self.graph, self.matches, self.parameters, self.current = graph, matches, parameters, current
        self.end, self.values, self.origins, self.causal = end, values, origins, causal
        self.tracer = fx.proxy.GraphAppendingTracer(graph)
        self.terms: dict[str, Term] = {}
        self.constants: Mapping[str, np.ndarray] = {}
        self._device: Any = None

    def fragment(self, nodes: tuple[ir.Node, ...], constants: Mapping[str, np.ndarray]) -> None:
        """Write all nodes of a fragment; their terms are kept by name."""
        self.constants = constants
        for node in nodes:
            self.write(node)

    def write(self, node: ir.Node) -> None:
        """Write one node. Raises `Refused` for one that has no torch form here."""
        terms = [self.resolve(str(value.name)) if value is not None and value.name else None for value in node.inputs]
        if is_composite(node):
            self.terms[str(node.outputs[0].name)] = write_composite(self, node, terms)
            return
        if node.domain or node.op_type not in WRITERS:
            raise Refused("fx-form", f"{node.op_type} has no form in fx here", (str(node.name),))
        made = WRITERS[node.op_type](self, node, terms)
        for value, term in zip(node.outputs, made if isinstance(made, list) else [made], strict=False):
            self.terms[str(value.name)] = term

    def resolve(self, name: str) -> Term:
        """A value by name: made here, a constant, an fx node that computes it, or written anew from what does."""
        if name not in self.terms:
            self.terms[name] = self._resolve(name)
        return self.terms[name]

    def _resolve(self, name: str) -> Term:
        if name in self.constants:
            return constant(self.constants[name], name)
        graph = self.matches.bridge.graph
        array = constant_of(graph.value(name)) if graph.has(name) else None
        if array is not None:
            computed = self._unfolded(name, array)
            return constant(array, name) if computed is None else self.proxy(computed)
        producer = self.matches.paths.producer.get(name)
        value = self._value(name)
        if producer is not None and not value.is_floating_point() and value.ndim <= 1:
            try:
                return self._written(producer, name)
            except Refused:
                pass
        node = self.matches.node(name)
        if node is not None and self.matches.order[node] < self.end:
            return self.proxy(self.current(node))
        if producer is None:
            raise Refused("no-fx-node", f"no node of the fx graph computes {name!r}", (name,))
        return self._written(producer, name)

    def _unfolded(self, name: str, array: np.ndarray) -> fx.Node | None:
        """The fx node of a constant that the exporter made of parameters ahead of time."""
        if array.dtype.kind != "f" or array.size <= 1 or name in self.parameters.known:
            return None
        if not parameter_names(self.matches.bridge.graph, self.parameters.known, name):
            return None
        node = self.matches.node(name)
        return None if node is None or self.matches.order[node] >= self.end else self.current(node)

    def _written(self, producer: ir.Node, name: str) -> Term:
        self.write(producer)
        return self.terms[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A node as something to compute with."""
        return fx.Proxy(node, self.tracer)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Proxy:
        """See `Scope.call`."""
        made: fx.Proxy = self.tracer.create_proxy("call_function", function, args, kwargs)
        return made

    def tensor(self, term: Term) -> fx.Proxy:
        """See `Scope.tensor`."""
        if isinstance(term, fx.Proxy):
            return term
        if isinstance(term, Constant):
            return self._tensor_of(term)
        if not all(isinstance(item, int) for item in term.items):
            raise Refused("fx-form", "sizes of dynamic axes are used as data")
        array = np.array(term.items[0] if term.scalar else term.items, np.int64)
        return self.proxy(self.parameters.buffer(self.graph, array, "sizes"))

    def _tensor_of(self, term: Constant) -> fx.Proxy:
        graph, known = self.matches.bridge.graph, self.parameters.known
        names = parameter_names(graph, known, term.name)
        if len(names) == 1 and term.name in known:
            return self.proxy(self.parameters.keep(self.graph, names[0]))
        if names and term.array.dtype.kind == "f":
            array = term.array.T if term.array.ndim == 2 else term.array  # matrices are stored the other way round
            return self.proxy(self.parameters.node(self.graph, array, f"folded/{term.name}", Origin(names))[0])
        return self.proxy(self.parameters.buffer(self.graph, term.array, term.name))

    def weight(self, term: Constant) -> fx.Proxy:
        """See `Weights.weight`."""
        node, turned = self.parameters.node(self.graph, term.array, term.name, self.origins.get(term.name))
        return self.proxy(node) if turned else self.proxy(node).t()

    def parameter(self, term: Constant) -> fx.Proxy:
        """See `Weights.parameter`."""
        origin = self.origins.get(term.name)
        return self.proxy(self.parameters.node(self.graph, term.array, term.name, origin)[0])

    def rank(self, name: str) -> int:
        """See `Scope.rank`."""
        return self._value(name).ndim

    def width(self, name: str) -> int:
        """See `Scope.width`."""
        return int(self._value(name).shape[-1])

    def dtype(self, name: str) -> torch.dtype:
        """See `Scope.dtype`."""
        return self._value(name).dtype

    def device(self) -> Any:
        """See `Scope.device`: that of the first tensor input."""
        if self._device is None:
            bridge = self.matches.bridge
            node = self.matches.node(bridge.graph.inputs[0].name)
            if node is None:
                raise Refused("no-fx-node", "the first input was not found in the fx graph")
            self._device = self.proxy(self.current(node)).device
        return self._device

    def _value(self, name: str) -> Tensor:
        return self.values[name] if name in self.values else self.matches.onnx[0][name]


def is_bias(term: Term) -> bool:
    """Whether a term is a vector of numbers that a linear layer may add by itself."""
    return isinstance(term, Constant) and term.array.ndim == 1
