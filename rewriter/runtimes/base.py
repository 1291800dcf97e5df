"""What every engine offers: build an artifact from a graph, load it, run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph

Feeds = Mapping[str, NDArray[Any]]


@runtime_checkable
class Executable(Protocol):
    """A loaded artifact."""

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """All outputs by name for one batch of named inputs."""
        ...

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """What is timed: a function that runs on these inputs whenever it is called, converting and copying none."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """An engine in one of its configurations; constructed without arguments, so that ``module:Class`` names it."""

    name: str

    def available(self) -> Refusal | None:
        """Why this engine cannot be used in this installation, or None."""
        ...

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        """Write an artifact for `graph` below `folder` and return its path.

        `shapes` are those of the inputs that will be timed; an engine with dynamic shapes may ignore them. Raises
        `rewriter.core.errors.UnsupportedOperator` for what the engine cannot run.
        """
        ...

    def load(self, artifact: Path, threads: int) -> Executable:
        """Load what `build` returned, to run on `threads` threads."""
        ...


@runtime_checkable
class Clocked(Protocol):
    """An executable that does not run in this process and measures time itself, where it runs."""

    reconnections: int

    def bind_clock(self, feeds: Feeds) -> Callable[[], float]:
        """Like `Executable.bind`, but each run returns its seconds by the clock of where it ran."""
        ...


def stopwatch(executable: Executable, feeds: Feeds) -> Callable[[], float]:
    """Runs on these inputs and returns the seconds that took, whenever it is called."""
    if isinstance(executable, Clocked):
        return executable.bind_clock(feeds)
    once, now = executable.bind(feeds), time.perf_counter

    def timed() -> float:
        begun = now()
        once()
        return now() - begun

    return timed


@runtime_checkable
class Caching(Protocol):
    """A runtime that keeps what it compiled below `cache`, if it is given a folder."""

    cache: Path | None


@runtime_checkable
class Calibrated(Protocol):
    """A runtime whose `build` chooses number formats by looking at samples: an ``.npz`` of inputs, samples first."""

    samples: Path | None


def named(spec: str) -> Any:
    """The object that ``package.module:attribute`` names. Raises ImportError or AttributeError like an import would."""
    from importlib import import_module

    module, colon, attribute = spec.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{spec!r} is not of the form module:attribute")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def of_spec(spec: str) -> Runtime:
    """A new runtime from its ``module:Class`` name."""
    runtime = named(spec)()
    if not isinstance(runtime, Runtime):
        raise TypeError(f"{spec} does not name a runtime")
    return runtime
