"""Regions of an fx graph replaced by rewritten sites. Everything outside of them stays node for node as it was."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.nn import functional

from rewriter.attention.lower import fragment, result_of
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.onnx import reads
from rewriter.graph.stepper import Fragment
from rewriter.torch_graphs.matching import Matches
from rewriter.torch_graphs.parameters import Parameters
from rewriter.torch_graphs.terms import Constant, Term
from rewriter.torch_graphs.translate import Translator, is_bias

FURTHER = 6  # nodes behind a result until an fx node computes the same


@dataclass(frozen=True)
class Spliced:
    """The rewritten module, how its parameters are named, and the sites that had to stay as they were."""

    module: fx.GraphModule
    names: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    refused: Mapping[str, Refusal] = field(default_factory=dict)


def splice(matches: Matches, before: Mapping[str, Site], after: Mapping[str, Site]) -> Spliced:
    """A new module with every site of `after` (by id) in place of what `before` says was found there.

    The given model and its parameters stay as they are. A site that cannot be written in fx is named in `refused`.
    """
    work = _Splice(matches)
    refused: dict[str, Refusal] = {}
    for name, site in sorted(after.items(), key=lambda item: item[1].order):
        try:
            work.replace(before[name], site)
        except Refused as problem:
            refused[name] = problem.refusal
    module = work.finish()
    return Spliced(module, work.parameters.names, work.parameters.removed, refused)


def regions(matches: Matches, site: Site) -> list[fx.Node]:
    """The fx nodes a site was read from, in their order: those between what it reads and what it gives."""
    try:
        ends = [node for _, node in landings(matches, result_of(site))]
    except Refused:
        return []
    part = fragment(matches.bridge.graph, site)
    sources = {node for name in part.reads() if (node := matches.node(name)) is not None}
    return between(sources, ends)


def between(sources: set[fx.Node], ends: list[fx.Node]) -> list[fx.Node]:
    """Nodes on the ways from `sources` (left out) to `ends` (included), in the graph's order."""
    nodes = list(ends[0].graph.nodes) if ends else []
    ahead = set(sources)
    for node in nodes:
        if any(one in ahead for one in node.all_input_nodes):
            ahead.add(node)
    back, stack = set[fx.Node](), list(ends)
    while stack:
        node = stack.pop()
        if node in back or node in sources:
            continue
        back.add(node)
        stack += node.all_input_nodes
    return [node for node in nodes if node in back and node in ahead]


def landings(matches: Matches, name: str) -> list[tuple[str, fx.Node]]:
    """The fx nodes that compute an ONNX value, or what is next made of it: (ONNX name, fx node)."""
    found, stack = [], [(name, 0)]
    outputs = {spec.name for spec in matches.bridge.graph.outputs}
    while stack:
        current, depth = stack.pop()
        node = matches.node(current)
        if node is not None:
            found.append((current, node))
            continue
        behind = matches.paths.consumers[current]
        if depth == FURTHER or not behind or current in outputs:
            raise Refused("no-fx-node", f"no node of the fx graph computes {name!r} or what follows it", (name,))
        stack += [(str(value.name), depth + 1) for one in behind for value in one.outputs if value.name]
    return found


class _Splice:
    """One copy of the host's graph, while sites are put into it."""

    def __init__(self, matches: Matches) -> None:
        self.matches, self.parameters = matches, Parameters(matches.bridge)
        host = matches.bridge.host.graph
        self.graph = copy.deepcopy(host)
        self.now = dict(zip(host.nodes, self.graph.nodes, strict=True))

    def replace(self, before: Site, after: Site) -> None:
        """Put one site in; nothing is changed if it is refused."""
        graph, matches = self.matches.bridge.graph, self.matches
        part = fragment(graph, after)
        landed = [pair for name in _results(after, part) for pair in landings(matches, name)]
        ends = [node for _, node in landed]
        last = max(ends, key=lambda node: matches.order[node])
        constants = fragment(graph, before).constants
        origins = self.parameters.origins(before, constants)
        fx_before = set(self.graph.nodes)
        with self.graph.inserting_before(self.now[last]):
            translator = Translator(
                self.graph,
                matches,
                self.parameters,
                self.now.__getitem__,
                matches.order[last],
                _values(matches, part),
                origins,
                _causal(matches, before, after),
            )
            try:
                translator.fragment(tuple(part.nodes), part.constants)
                made = {name: self._at(translator, name, result_of(after)) for name, _ in landed}
            except Refused:
                self._undo(fx_before)
                raise
        self._put(before, landed, made)

    def _at(self, translator: Translator, name: str, result: str) -> fx.Node:
        """The new node of a value at or behind the site's result."""
        if name not in translator.terms:
            path = self.matches.paths.between(result, name) or []
            for node in path:
                if not _absorbed(translator, node):
                    translator.write(node)
        return translator.tensor(translator.terms[name]).node

    def _put(self, before: Site, landed: list[tuple[str, fx.Node]], made: Mapping[str, fx.Node]) -> None:
        self._drop_asserts(before, [node for _, node in landed])
        for name, node in landed:
            old, new = self.now[node], made[name]
            new.meta.setdefault("nn_module_stack", old.meta.get("nn_module_stack"))
            old.replace_all_uses_with(new)
            self.now[node] = new
        if len(landed) > 1:
            sort(self.graph)

    def _drop_asserts(self, site: Site, ends: list[fx.Node]) -> None:
        """Checks of values inside the old region would keep it alive."""
        for node in regions(self.matches, site):
            for user in list(self.now[node].users):
                if node not in ends and not user.users and "assert" in str(user.target):
                    self.graph.erase_node(user)

    def _undo(self, known: set[fx.Node]) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node not in known:
                self.graph.erase_node(node)

    def finish(self) -> fx.GraphModule:
        """Without what nothing reads any more."""
        self.graph.eliminate_dead_code(is_impure_node=_has_effects)
        self.graph.lint()
        made = self.parameters.module(self.graph)
        host = self.matches.bridge.host
        made.train(host.training and not hasattr(host.graph._codegen, "pytree_info"))
        return made


def _has_effects(node: fx.Node) -> bool:
    """Whether a node must stay although nothing reads it: writes, checks, guards. Dropout draws numbers, and may go."""
    if node.op in ("placeholder", "output") or "assert" in str(node.target) or "guards" in str(node.target):
        return True
    if node.op == "call_method" and str(node.target).endswith("_"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return (node.target._schema.is_mutable and not _writes_for_nobody(node)) or "constrain" in str(node.target)
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (name in ("setitem", "setattr") or "constrain" in name)


def _writes_for_nobody(node: fx.Node) -> bool:
    """Whether what an operator writes into is new memory that nothing else reads."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or set(written.users) != {node}:
        return False
    if not isinstance(written.target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in written.target._schema.returns)


def _absorbed(translator: Translator, node: ir.Node) -> bool:
    """Give a vector that is added to a linear layer's result to the layer itself."""
    if node.op_type != "Add":
        return False
    terms = [translator.resolve(str(value.name)) for value in node.inputs if value is not None]
    for one, other in (terms, terms[::-1]):
        if isinstance(one, Constant) and is_bias(one) and _is_linear(other):
            assert isinstance(other, fx.Proxy)
            return _give_bias(translator, node, one, other.node)
    return False


def _is_linear(term: Term) -> bool:
    return isinstance(term, fx.Proxy) and term.node.target is functional.linear and not term.node.users


def _give_bias(translator: Translator, node: ir.Node, bias: Constant, linear: fx.Node) -> bool:
    x, weight, own = linear.args
    if own is None:
        with translator.graph.inserting_before(linear):
            linear.args = (x, weight, translator.tensor(bias).node)
    elif not isinstance(own, fx.Node) or not translator.parameters.merge(own, bias.array, bias.name):
        return False
    translator.terms[str(node.outputs[0].name)] = translator.proxy(linear)
    return True


def _results(site: Site, part: Fragment) -> list[str]:
    names = [result_of(site)]
    if isinstance(site, AttentionSite):
        made = {str(value.name) for node in part.nodes for value in node.outputs}
        names += [p.present for p in (site.key, site.value) if p.present and p.present in made]
    return list(dict.fromkeys(names))


def _causal(matches: Matches, before: Site, after: Site) -> bool:
    """Whether all that is added to the scores is causality, counted from the start of both."""
    if not isinstance(after, AttentionSite) or after.softcap:
        return False
    if after.bias.kind == "causal":
        return True
    calls = [n for n in regions(matches, before) if "scaled_dot_product_attention" in str(n.target)]
    return len(calls) == 1 and bool(calls[0].kwargs.get("is_causal") or (len(calls[0].args) > 5 and calls[0].args[5]))


def _values(matches: Matches, part: Fragment) -> dict[str, Tensor]:
    """What a fragment computes in the first run."""
    values = matches.onnx[0]
    interpreter = values.interpreter
    env: dict[str, Any] = {name: interpreter.tensor(array) for name, array in part.constants.items()}
    made = {str(value.name) for node in part.nodes for value in node.outputs}
    for node in part.nodes:
        env.update((name, values[name]) for name in reads(node) if name not in env and name not in made)
    with torch.no_grad():
        interpreter.run_nodes(part.nodes, env)
    interpreter.forget(part.nodes)
    return env


def sort(graph: fx.Graph) -> None:
    """Producers before consumers, otherwise in the order they are in."""
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    waits = {node: len(node.all_input_nodes) for node in nodes}
    ready = [place[node] for node in nodes if not waits[node]]
    heapq.heapify(ready)
    for node in _in_turn(nodes, place, waits, ready):
        node.graph._root.prepend(node)


def _in_turn(
    nodes: list[fx.Node], place: dict[fx.Node, int], waits: dict[fx.Node, int], ready: list[int]
) -> Iterator[fx.Node]:
    while ready:
        node = nodes[heapq.heappop(ready)]
        yield node
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, place[user])
