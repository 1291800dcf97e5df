"""Parameters of a rewritten module: under their names where one becomes one, else named after what they came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.graph.tensors import to_torch
from rewriter.torch_graphs.bridge import Bridge, parameter_names


@dataclass(frozen=True)
class Origin:
    """Where a weight of a site comes from: parameters by full name; `turned` says how one stores it, if it is one."""

    names: tuple[str, ...]
    single: bool = False
    turned: bool = False


@dataclass
class _New:
    node: fx.Node
    tensor: Tensor
    name: str
    origin: Origin
    kept: bool


@dataclass
class Parameters:
    """Makes `get_attr` nodes for weights, and in the end the module that holds them.

    `names` maps each parameter that is new or has changed to those it came from; `removed` are the full names of
    parameters that the rewritten module has no use for.
    """

    bridge: Bridge
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    _made: list[_New] = field(default_factory=list)

    def __post_init__(self) -> None:
        host = self.bridge.host
        self.known: dict[str, Tensor] = dict(host.named_parameters(remove_duplicate=False))
        self.known |= dict(host.named_buffers(remove_duplicate=False))

    def origins(self, site: Site, constants: Mapping[str, np.ndarray]) -> dict[str, Origin]:
        """For every constant that lowering the site as it was found makes: the parameters it comes from."""
        found = {}
        for name, array in constants.items():
            role = name.removeprefix(f"{site.id}/")
            if "." in role:
                found[name] = self._origin(site, role, array)
        return found

    def _origin(self, site: Site, role: str, array: np.ndarray) -> Origin:
        names = parameter_names(self.bridge.graph, self.known, _initialiser(site, role))
        near = names if role.endswith(".weight") else ()
        if not near:
            parents = {name.rpartition(".")[0] for name in names}
            near = tuple(name for name in self.known if name.rpartition(".")[0] in parents)
        far = tuple(self.known) if array.ndim == 1 and array.any() else ()
        for name in (*near, *far):
            for turned in (True, False) if array.ndim == 2 else (False,):
                if _equal(self.known[name], array.T if turned else array):
                    return Origin((name,), True, turned)
        packed = tuple(name for name in near if _holds(self.known[name], array))
        return Origin(near if role.endswith(".weight") else packed[:1])

    def node(self, graph: fx.Graph, array: np.ndarray, role: str, origin: Origin | None) -> tuple[fx.Node, bool]:
        """The node of a weight given as ONNX has it, and whether it is stored the other way round."""
        origin = origin or Origin(())
        turned = origin.turned or not origin.single
        stored = np.ascontiguousarray(array.T if turned and array.ndim == 2 else array)
        kept = origin.single and _equal(self.known[origin.names[0]], stored)
        if kept:
            return self.keep(graph, origin.names[0]), turned
        tensor = to_torch(np.array(stored))
        if origin.names:
            tensor = tensor.to(self.known[origin.names[0]].dtype)
        node = graph.create_node("get_attr", f"_new_{len(self._made)}")
        name = origin.names[0] if origin.single else _name(origin, role)
        self._made.append(_New(node, nn.Parameter(tensor), name, origin, False))
        return node, turned

    def keep(self, graph: fx.Graph, name: str) -> fx.Node:
        """The node of a parameter as it is."""
        node = graph.create_node("get_attr", name)
        self._made.append(_New(node, self.known[name], name, Origin((name,), True), True))
        return node

    def merge(self, node: fx.Node, array: np.ndarray, name: str) -> bool:
        """Add a vector to a new parameter, which takes its name; False if the node is no new parameter."""
        new = next((one for one in self._made if one.node is node and not one.kept), None)
        if new is None or tuple(new.tensor.shape) != array.shape or name not in self.known:
            return False
        with torch.no_grad():
            new.tensor += to_torch(np.array(array)).to(new.tensor.dtype)
        new.name, new.origin = name, Origin((name, *(n for n in new.origin.names if n != name)), True)
        return True

    def buffer(self, graph: fx.Graph, array: np.ndarray, name: str) -> fx.Node:
        """The node of numbers that are no parameter."""
        node = graph.create_node("get_attr", f"_new_{len(self._made)}")
        clean = "".join(c if c.isalnum() else "_" for c in name)
        self._made.append(_New(node, to_torch(np.array(array)), f"constants.{clean}", Origin(()), True))
        return node

    def module(self, graph: fx.Graph) -> fx.GraphModule:
        """A module of copies: the graph's old parameters that are still read, and the new ones."""
        memo: dict[int, Any] = {}
        root = self._old(graph, memo)
        alive = {node for node in graph.nodes if node.op == "get_attr"}
        taken = set(root)
        for new in self._made:
            if new.node not in alive:
                continue
            if new.tensor is self.known.get(new.name):
                root[new.name] = copy.deepcopy(new.tensor, memo)
            else:
                new.node.target = _free(new.name, taken, self.known if not new.origin.single else ())
                root[new.node.target] = new.tensor
                taken.add(new.node.target)
                if isinstance(new.tensor, nn.Parameter):
                    self.names[new.node.target] = new.origin.names
        made = fx.GraphModule(root, graph, "RewrittenModule")
        left = dict(made.named_parameters(remove_duplicate=False))
        self.removed = tuple(n for n, _ in self.bridge.host.named_parameters(remove_duplicate=False) if n not in left)
        return made

    def _old(self, graph: fx.Graph, memo: dict[int, Any]) -> dict[str, Any]:
        fresh = {new.node for new in self._made}
        root: dict[str, Any] = {}
        for node in graph.nodes:
            if node in fresh or node.op not in ("get_attr", "call_module"):
                continue
            target = str(node.target)
            part = fetch(self.bridge.host, target)
            if isinstance(part, Tensor) and part.requires_grad and not part.is_leaf:
                part = part.detach()
            root[target] = copy.deepcopy(part, memo)
        return root


def fetch(module: nn.Module, target: str) -> Any:
    """What a dotted name refers to."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _initialiser(site: Site, role: str) -> str:
    """The ONNX name of the weight that a role belongs to."""
    part = role.partition(".")[0]
    if isinstance(site, FeedForwardSite):
        return site.weight_names.get(part, "")
    if part == "output":
        return "" if site.output is None else site.output.weight_name
    if not isinstance(site, AttentionSite) or part not in ("query", "key", "value"):
        return ""
    return {"query": site.query, "key": site.key, "value": site.value}[part].weight_name


def _equal(tensor: Tensor, array: np.ndarray) -> bool:
    if tuple(tensor.shape) != array.shape or not tensor.is_floating_point():
        return False
    return bool(torch.equal(tensor.detach(), to_torch(np.array(array)).to(tensor.dtype)))


def _holds(tensor: Tensor, array: np.ndarray) -> bool:
    """Whether a longer vector holds all numbers of a vector: a packed bias."""
    if tensor.ndim != 1 or array.ndim != 1 or tensor.numel() <= array.size or not tensor.is_floating_point():
        return False
    return bool(torch.isin(to_torch(np.array(array)).to(tensor.dtype), tensor.detach()).all())


def _name(origin: Origin, role: str) -> str:
    """``encoder.attn.qkv.weight`` as ``encoder.attn.qkv.query.weight``; ``rewritten.`` and the site where unknown."""
    site, _, part = role.rpartition("/")
    if not origin.names:
        return f"rewritten.{site}.{part}"
    parent = origin.names[0].rpartition(".")[0]
    return f"{parent}.{part}" if parent else part


def _free(name: str, taken: set[str], avoided: Any) -> str:
    """The name, numbered if something that stays has it, lies in it, or holds it as a module."""

    def clash(candidate: str) -> bool:
        inside = any(other.startswith(f"{candidate}.") or candidate.startswith(f"{other}.") for other in taken)
        return candidate in taken or candidate in avoided or inside

    free, number = name, 0
    while clash(free):
        number += 1
        free = f"rewritten.{name}" + (f"_{number}" if number > 1 else "")
    return free
