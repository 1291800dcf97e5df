"""Which value of the ONNX graph is which fx node: the exporter's names propose, numbers decide.

Both graphs run on the same two feeds with padding, and with noise on vectors that both have: freshly built
models have zero biases, and then a result before and after its bias could not be told apart.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.attention.feeds import draw, roles, usable_feeds
from rewriter.attention.paths import Paths
from rewriter.attention.values import Values
from rewriter.core.errors import ModelError, UserError
from rewriter.graph.interpreter import Interpreter
from rewriter.torch_graphs.bridge import Bridge

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NOISE = 0.1
RUNS = 2


class Matches:
    """`node(name)` is the fx node that computes a value of the ONNX graph, or None."""

    def __init__(self, bridge: Bridge, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.bridge, self.feeds = bridge, feeds
        shaken = _shaken(bridge)
        interpreter = Interpreter(bridge.graph)
        noisy = {name: interpreter.tensor(tensor) for name, tensor in shaken.items()}
        interpreter = Interpreter(bridge.graph, constants={**interpreter.constants, **noisy})
        paths = Paths(bridge.graph)
        self.paths = paths
        self.onnx = [Values(interpreter, paths, one) for one in feeds]
        self.fx = [_record(bridge, one, shaken) for one in feeds]
        self.order = {node: place for place, node in enumerate(bridge.host.graph.nodes)}
        self._by_name = {node.name: node for node in bridge.host.graph.nodes}
        self._by_shape: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            key = self._key([values.get(node) for values in self.fx])
            if key is not None:
                self._by_shape[key].append(node)
        self._found: dict[str, fx.Node | None] = {}

    def node(self, name: str) -> fx.Node | None:
        """The first fx node that computes the value; one that the exporter named comes before others."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def rank(self, name: str) -> int:
        """Number of axes of a value."""
        return len(self.onnx[0].shape(name))

    def _find(self, name: str) -> fx.Node | None:
        wanted = [values[name] for values in self.onnx]
        key = self._key(wanted)
        if key is None:
            return None
        claimed = [self._by_name[n] for n in self.bridge.fx_names.get(name, ()) if n in self._by_name]
        plain = all(bool((value == value.reshape(-1)[:1]).all()) for value in wanted if value.numel())
        for node in (*claimed, *([] if plain else self._by_shape[key])):
            if self._equal(node, wanted):
                return node
        return None

    def _key(self, tensors: Sequence[Tensor | None]) -> Any:
        if any(tensor is None for tensor in tensors):
            return None
        return tuple((tuple(tensor.shape), tensor.is_floating_point()) for tensor in tensors if tensor is not None)

    def _equal(self, node: fx.Node, wanted: Sequence[Tensor]) -> bool:
        found = [values.get(node) for values in self.fx]
        return all(one is not None and _same(one, other) for one, other in zip(found, wanted, strict=True))


def match(bridge: Bridge, seed: int = 0) -> Matches:
    """Run both graphs and match them; raises `ModelError` if the fx graph does not run on what the ONNX graph takes."""
    names = [spec.name for spec in bridge.graph.inputs]
    example = {name: bridge.leaves[place].detach().numpy() for name, place in zip(names, bridge.fed, strict=True)}
    attempts: list[list[Mapping[str, np.ndarray]]] = [*_drawn(bridge, example, seed), [example]]
    problem: Exception | None = None
    for feeds in attempts:
        try:
            return Matches(bridge, feeds)
        except (UserError, RuntimeError, ValueError, LookupError, TypeError, AssertionError) as failed:
            problem = failed
    raise ModelError(f"the fx graph could not be run: {problem}", "Run it on the example by itself") from problem


def _drawn(bridge: Bridge, example: Mapping[str, np.ndarray], seed: int) -> list[list[Mapping[str, np.ndarray]]]:
    """Feeds of two sizes, with masks that leave most queries a key."""
    graph = bridge.graph
    runs = usable_feeds(Interpreter(graph), Paths(graph), example, seed)
    if not runs:
        return []
    known = roles(graph)
    return [
        [
            run.feeds if run.sizes is None else draw(graph, run.sizes, known, seed + index, False, example)
            for index, run in enumerate(runs[:RUNS])
        ]
    ]


def _same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
        return False
    if not found.is_floating_point():
        return bool(torch.equal(found.to(wanted.dtype), wanted))
    tolerance = max(CLOSE[found.dtype], CLOSE[wanted.dtype])
    known = ~torch.isnan(wanted)  # rows without any key are NaN in ONNX, and zero in torch's own attention
    if wanted.numel() and not known.any():
        return False
    found, wanted = found[known].double(), wanted[known].double()
    if not torch.equal(torch.isfinite(found), torch.isfinite(wanted)):
        return False
    usual = torch.isfinite(wanted) & (wanted.abs() < 1e30)
    difference = torch.where(usual, found - wanted, 0.0).abs()
    scale = torch.where(usual, wanted, 0.0).abs().max() if wanted.numel() else torch.tensor(0.0)
    close = bool((difference <= tolerance * (scale + 1e-30)).all())
    return close and torch.equal(torch.sign(found[~usual]), torch.sign(wanted[~usual]))


def _shaken(bridge: Bridge) -> dict[str, Tensor]:
    """Vectors of floats that both graphs know by the same name, with noise."""
    generator = torch.Generator().manual_seed(0)
    constants = bridge.graph.constants
    found = {}
    for name, parameter in bridge.host.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point() and name in constants:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            found[name] = (parameter.detach() + NOISE * noise).detach()
    return found


class _Recorder(fx.Interpreter):
    """Keeps a copy of every tensor a graph computes; copies, since some operators write into their input."""

    def __init__(self, host: fx.GraphModule) -> None:
        super().__init__(host, garbage_collect_values=True)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("get_attr", "output"):
            self.found[n] = value.detach().clone()
        return value


class _Run(nn.Module):
    """A graph run node by node, as a module, so that its parameters can be exchanged for the time of a call."""

    def __init__(self, recorder: _Recorder, host: fx.GraphModule) -> None:
        super().__init__()
        self.recorder, self.host = recorder, host

    def forward(self, *leaves: Any) -> None:
        self.recorder.run(*leaves, enable_io_processing=False)


def _record(bridge: Bridge, feeds: Mapping[str, np.ndarray], shaken: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    recorder = _Recorder(bridge.host)
    leaves = bridge.placeholders(bridge.leaves_of(feeds))
    exchanged = {f"host.{name}": tensor for name, tensor in shaken.items()}
    with torch.no_grad(), evaluating(bridge.host):
        torch.func.functional_call(_Run(recorder, bridge.host), exchanged, tuple(leaves))
    return recorder.found


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode for the time being; what torch.export has made is in it for good."""
    modes = [(part, part.training) for part in module.modules()]
    with contextlib.suppress(NotImplementedError):
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
