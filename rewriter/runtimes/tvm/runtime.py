"""TVM behind the interface of all runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import Executable


class TvmRuntime:
    """Builds and runs graphs with our kernel templates. Modules that load TVM are imported on first use.

    `cache` keeps compiled kernels and tuning records between runs. With it and `tune`, shapes that it does not know yet
    are measured (about a second each, see `rewriter.runtimes.tvm.tuning`); otherwise they take their default tiles.
    """

    name = "tvm"

    def __init__(self, cache: Path | None = None, tune: bool = True) -> None:
        self.cache, self.tune = cache, tune

    def available(self) -> Refusal | None:
        """TVM must be installed."""
        if find_spec("tvm") is None:
            return Refusal("tvm-missing", "apache-tvm is not installed; pip install apache-tvm==0.27.0.post1")
        return None

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        """An artifact folder for one set of input shapes, below `folder`."""
        return self.build_buckets(graph, [shapes], folder, target)

    def build_buckets(
        self,
        graph: OnnxGraph,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        folder: Path,
        target: Target,
        pad: Mapping[str, float] | None = None,
    ) -> Path:
        """An artifact folder for several sets of input shapes; `pad` as for `rewriter.runtimes.tvm.compile.build`."""
        from rewriter.runtimes.tvm.compile import build
        from rewriter.runtimes.tvm.database import TuningDatabase
        from rewriter.runtimes.tvm.tuned_tiles import tuned_tiles
        from rewriter.runtimes.tvm.tuning import Tuner

        if self.cache is None:
            return build(graph, shapes, folder / "tvm", target, pad=pad)
        tuner = Tuner(target, TuningDatabase(self.cache / "tuning.jsonl"), self.tune)
        code, tiles = self.cache / "code", tuned_tiles(target, tuner)
        return build(graph, shapes, folder / "tvm", target, code, tiles, pad, self._polish(target))

    def _polish(self, target: Target) -> Callable[[Any, Mapping[str, int]], Any] | None:
        """What schedules kernels without a template; None for TVM's own schedules."""
        return None

    def load(self, artifact: Path, threads: int) -> Executable:
        """Load a folder that `build` returned."""
        from rewriter.runtimes.tvm.load import load

        return load(artifact, threads)


class TvmUntuned(TvmRuntime):
    """The same without measuring: what the cache knows, and default tiles for what it does not."""

    def __init__(self, cache: Path | None = None) -> None:
        super().__init__(cache, tune=False)


class TvmMetaScheduled(TvmRuntime):
    """Everything tuned: templates by measuring, other kernels by MetaSchedule. Needs a `cache` to remember."""

    name = "tvm-metaschedule"

    def __init__(self, cache: Path | None = None, tune: bool = True) -> None:
        super().__init__(cache, tune)

    def _polish(self, target: Target) -> Callable[[Any, Mapping[str, int]], Any] | None:
        from rewriter.runtimes.tvm.database import TuningDatabase
        from rewriter.runtimes.tvm.metaschedule import MetaScheduler

        assert self.cache is not None
        return MetaScheduler(target, TuningDatabase(self.cache / "tuning.jsonl")).polish
