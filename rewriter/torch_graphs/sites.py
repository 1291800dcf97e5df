"""The sites of a torch model, each with the fx nodes and the parameters it was read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rewriter.attention.inspect import Refusals, describe
from rewriter.attention.lower import fragment, result_of
from rewriter.attention.recognise import recognise
from rewriter.core.errors import OptionError, UserError
from rewriter.core.refusal import Refused
from rewriter.core.site import AttentionSite, Recognition, Site, State
from rewriter.graph.onnx import OnnxGraph
from rewriter.torch_graphs.bridge import Bridge, bridge, parameter_names, unlifted
from rewriter.torch_graphs.matching import Matches, match
from rewriter.torch_graphs.parameters import Parameters
from rewriter.torch_graphs.splice import landings, regions


class TorchSites:
    """What was recognised in a torch model; iterates over its sites in data-flow order, ``sites[id]`` is one of them.

    It holds the model in fx (`bridge.host`) and in ONNX (`graph`), and is what `apply` rewrites: a model is exported
    and recognised once, however many plans are tried on it.
    """

    def __init__(self, bridge: Bridge, recognition: Recognition) -> None:
        self.bridge, self.recognition = bridge, recognition

    @property
    def graph(self) -> OnnxGraph:
        """The model in ONNX, where sites refer to values by name."""
        return self.bridge.graph

    @cached_property
    def matches(self) -> Matches:
        """Which ONNX value is which fx node. Raises `ModelError` if the fx graph cannot be run."""
        return match(self.bridge)

    @property
    def complete(self) -> bool:
        """Whether the results of all sites that can be rewritten are computed by nodes of the fx graph."""
        try:
            for site in self:
                if site.state is State.LOWERABLE:
                    landings(self.matches, result_of(site))
        except (Refused, UserError):
            return False
        return True

    def __iter__(self) -> Iterator[Site]:
        return iter(self.recognition.sites)

    def __len__(self) -> int:
        return len(self.recognition.sites)

    def __getitem__(self, site: str) -> Site:
        found = {one.id: one for one in self}
        if site not in found:
            raise OptionError(f"there is no site {site!r}", f"The sites are {', '.join(found)}")
        return found[site]

    def fx_nodes(self, site: Site) -> tuple[str, ...]:
        """Names of the fx nodes the site was read from, in the graph's order.

        They are those between what the site reads and its result; where that is not known, those that the exporter
        says its core stems from.
        """
        nodes = self._region(site)
        if nodes:
            return tuple(nodes)
        known = {node.name for node in self.bridge.host.graph.nodes}
        claimed = [name for label in site.nodes for name in self.bridge.fx_names.get(label, ()) if name in known]
        return tuple(dict.fromkeys(claimed))

    def _region(self, site: Site) -> list[str]:
        try:
            return [node.name for node in regions(self.matches, site)]
        except (Refused, UserError):
            return []

    def parameters(self, site: Site) -> dict[str, tuple[str, ...]]:
        """Full names of the parameters behind each weight and bias: ``{"query.weight": ("attn.q.weight",)}``.

        A packed projection gives the same name for several roles.
        """
        made = Parameters(self.bridge)
        try:
            constants = fragment(self.graph, site).constants
        except (Refused, UserError):
            return self._claimed(site, made)
        origins = made.origins(site, constants)
        return {name.removeprefix(f"{site.id}/"): origin.names for name, origin in origins.items() if origin.names}

    def _claimed(self, site: Site, made: Parameters) -> dict[str, tuple[str, ...]]:
        if not isinstance(site, AttentionSite):
            return {}
        given = {"query": site.query.weight_name, "key": site.key.weight_name, "value": site.value.weight_name}
        given |= {} if site.output is None else {"output": site.output.weight_name}
        found = {f"{role}.weight": parameter_names(self.graph, made.known, name) for role, name in given.items()}
        return {role: names for role, names in found.items() if names}

    def describe(self, refusals: Refusals) -> dict[str, Any]:
        """The JSON of `optimize inspect`, with ``fx_nodes`` and ``parameters`` at every site."""
        found = describe(self.recognition, self.graph, refusals)
        for entry in (*found["attention"], *found["feed_forward"]):
            site = self[entry["id"]]
            parameters = {role: list(names) for role, names in self.parameters(site).items()}
            entry |= {"fx_nodes": list(self.fx_nodes(site)), "parameters": parameters}
        for entry in found["unrecognised"]:
            entry["fx_nodes"] = list(self.bridge.fx_names.get(entry["node"], ()))
        return found


def read(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> TorchSites:
    """Recognise a torch model: an `ExportedProgram`, an `fx.GraphModule`, or any module with an example of its inputs.

    A graph module is rewritten in its own graph if all its sites are seen there; `symbolic_trace` does not look into
    torch's own layers, and then it is the graph torch.export makes. The example may be nested, positional (`inputs`)
    and by keyword (`kwargs`); `dynamic_shapes` are as `torch.export.export` takes them. Raises `UserError` without an
    example, `ModelError` if torch cannot export the model.
    """
    made = bridge(model, inputs, kwargs, dynamic_shapes)
    args, named = made.example
    found = TorchSites(made, _recognised(made.graph, made.feeds_of(*args, **named)))
    if not isinstance(model, fx.GraphModule) or found.complete:
        return found
    return TorchSites(replace(made, host=unlifted(made.program)), found.recognition)


def _recognised(graph: OnnxGraph, example: Mapping[str, np.ndarray]) -> Recognition:
    """With the example, and where that leaves doubts with drawn numbers too: examples are often all ones."""
    first = recognise(graph, example)
    if all(site.state is State.LOWERABLE for site in first.sites) and not first.unrecognised:
        return first
    second = recognise(graph)
    counts = [sum(site.state is State.LOWERABLE for site in found.sites) for found in (first, second)]
    return second if counts[1] > counts[0] else first
