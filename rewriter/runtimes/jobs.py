"""What a worker is asked to do with a runtime: build, load, run. Names of runtimes are ``module:Class``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.runtimes.base import Caching, Calibrated, Executable, Feeds, of_spec
from rewriter.runtimes.worker_main import fetch, store


def build(
    runtime: str,
    model: Path,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    target: Target,
    cache: Path | None = None,
    samples: Path | None = None,
) -> Path:
    """Build an artifact from a saved graph, with composites or without.

    `cache` keeps compiled code; `samples` are inputs to calibrate on, for runtimes that do.
    """
    from rewriter.graph.onnx import load as load_graph

    engine = of_spec(runtime)
    if isinstance(engine, Caching):
        engine.cache = cache
    if isinstance(engine, Calibrated):
        engine.samples = samples
    return engine.build(load_graph(model), shapes, folder, target)


def available(runtime: str) -> Refusal | None:
    """Why a runtime cannot be used here, or None."""
    return of_spec(runtime).available()


def open_executable(key: str, runtime: str, artifact: Path, threads: int) -> None:
    """Load an artifact and keep it in this process under `key`."""
    store(key, of_spec(runtime).load(artifact, threads))


def run(key: str, feeds: Feeds) -> dict[str, Any]:
    """One run of a loaded artifact, outputs by name."""
    executable: Executable = fetch(key)
    return executable.run(feeds)
