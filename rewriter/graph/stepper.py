"""One graph on many batches in lock step, lazily: how calibration walks teacher and student side by side.

Values are computed when asked for and kept until `Stepper.prune` says that nothing later needs them, so memory holds
a frontier of the graph instead of all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.core.errors import ModelError
from rewriter.graph.interpreter import Feeds, Interpreter
from rewriter.graph.onnx import OnnxGraph, reads


@dataclass(frozen=True)
class Fragment:
    """Nodes that are not part of a graph but read its values, with weights of their own.

    `nodes` are sorted; `constants` are arrays by the names the nodes read; `outputs` are the names they are run for.
    """

    nodes: tuple[ir.Node, ...] | list[ir.Node]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    outputs: tuple[str, ...] | list[str] = ()

    def reads(self) -> list[str]:
        """Names the fragment takes from the graph below it."""
        own = set(self.constants)
        names: list[str] = []
        for node in self.nodes:
            names += [name for name in reads(node) if name not in own]
            own |= {value.name or "" for value in node.outputs}
        return list(dict.fromkeys(names))


class Stepper:
    """Runs one graph on several batches, each value at most once per batch.

    `batches` are feeds by input name; `keep` names values that are never dropped by `prune` (the graph's outputs, if
    they are still to be asked for). Batches are numbered by their place.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        batches: Sequence[Feeds],
        keep: Collection[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.graph, self.keep = graph, frozenset(keep)
        self.interpreter = Interpreter(graph, dtype)
        self._producer = {value.name: node for node in graph.topological() for value in node.outputs if value.name}
        self._order = {id(node): index for index, node in enumerate(graph.topological())}
        constants = self.interpreter.constants
        bound = (self.interpreter.bind(feeds) for feeds in batches)
        self._values = [{name: value for name, value in env.items() if name not in constants} for env in bound]
        self._fragments: dict[int, tuple[Fragment, dict[str, Tensor]]] = {}

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._values)

    def value(self, name: str, batch: int) -> Tensor:
        """The value of that name on a batch, computed now if it never was. Raises `ModelError` for unknown names.

        Also raises `ModelError` when it would have to be computed again from a graph input that was pruned.
        """
        self.advance([name], batch)
        return self._lookup(name, batch)

    def advance(self, names: Iterable[str], batch: int) -> None:
        """Compute several values in one walk."""
        wanted = list(names)
        store = self._values[batch]
        env = {**self.interpreter.constants, **store}
        for node in self._missing_nodes(wanted, store):
            self.interpreter.run_nodes([node], env)
            for value in node.outputs:
                # An overridden output of a node with several must survive the others being computed.
                if value.name and value.name in env and value.name not in store:
                    store[value.name] = env[value.name]
                elif value.name in store:
                    env[value.name] = store[value.name]

    def override(self, name: str, batch: int, tensor: Tensor | np.ndarray) -> None:
        """Put a value in place of what the graph would compute; nodes needed only for it never run.

        What was already computed from the old value stays: override before asking for what depends on it.
        """
        self.graph.value(name)
        self._values[batch][name] = self.interpreter.tensor(tensor)

    def run_fragment(self, fragment: Fragment, batch: int, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """Values of a fragment (its outputs by default) on a batch; only the graph values it reads are recorded."""
        names = list(fragment.outputs if wanted is None else wanted)
        self.advance(fragment.reads(), batch)
        env = {**self.interpreter.constants, **self._values[batch], **self._constants_of(fragment)}
        self.interpreter.run_nodes(fragment.nodes, env, set(env) | set(names))
        return {name: env[name] for name in names}

    def prune(self, future: Collection[str], batch: int | None = None) -> None:
        """Drop every value, of all batches or of one, that neither `keep` nor a name in `future` still needs."""
        for store in self._values if batch is None else [self._values[batch]]:
            live = self._live({*future, *self.keep}, store)
            for name in [name for name in store if name not in live]:
                del store[name]

    def held(self, batch: int) -> frozenset[str]:
        """Names of the values stored for a batch."""
        return frozenset(self._values[batch])

    def held_bytes(self) -> int:
        """Memory of all stored values, views counted once."""
        storages = [tensor.untyped_storage() for store in self._values for tensor in store.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _lookup(self, name: str, batch: int) -> Tensor:
        store = self._values[batch]
        return store[name] if name in store else self.interpreter.constants[name]

    def _missing_nodes(self, wanted: list[str], store: Mapping[str, Tensor]) -> list[ir.Node]:
        found: dict[int, ir.Node] = {}
        queue = list(wanted)
        while queue:
            name = queue.pop()
            if name in store or name in self.interpreter.constants:
                continue
            node = self._producer.get(name)
            if node is None:
                self.graph.value(name)
                raise ModelError(f"{name!r} was dropped and cannot be computed again", "Name it in prune(future)")
            if id(node) not in found:
                found[id(node)] = node
                queue += reads(node)
        return sorted(found.values(), key=lambda node: self._order[id(node)])

    def _live(self, future: Collection[str], store: Mapping[str, Tensor]) -> set[str]:
        """Stored names reached walking back from `future` through what is not computed yet."""
        live: set[str] = set()
        seen: set[str] = set()
        queue = list(future)
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in store:
                live.add(name)
            elif name in self._producer:
                queue += reads(self._producer[name])
        return live

    def _constants_of(self, fragment: Fragment) -> dict[str, Tensor]:
        entry = self._fragments.get(id(fragment))
        if entry is None or entry[0] is not fragment:
            tensors = {name: self.interpreter.tensor(array) for name, array in fragment.constants.items()}
            entry = (fragment, tensors)
            self._fragments = {id(fragment): entry}  # one at a time: callers walk batches under one fragment
        return entry[1]
