"""Everything a search works with: the model and its sites, the data in three splits, the target, the caches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
import psutil

from rewriter.accuracy.splits import Splits
from rewriter.assembly.several_graphs import Sibling
from rewriter.core.errors import ModelError
from rewriter.core.options import Options
from rewriter.core.progress import Progress
from rewriter.core.site import Recognition, State
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes import jobs
from rewriter.runtimes.retry import call_twice
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.caches import fitted_shapes
from rewriter.search.selection import Selection
from rewriter.search.traffic import Traffic
from rewriter.search.workload import Workload

if TYPE_CHECKING:
    from rewriter.search.forms import FormChoice

TVM = "rewriter.runtimes.tvm.runtime:TvmRuntime"
TVM_UNTUNED = "rewriter.runtimes.tvm.runtime:TvmUntuned"
TVM_METASCHEDULE = "rewriter.runtimes.tvm.runtime:TvmMetaScheduled"
TVM_REMOTE = "rewriter.runtimes.tvm.remote:TvmRemote"
ONNXRUNTIME = "rewriter.runtimes.onnxruntime:OnnxRuntime"
ONNXRUNTIME_INT8 = "rewriter.runtimes.onnxruntime:OnnxRuntimeInt8"
OPENVINO_INT8 = "rewriter.runtimes.openvino:OpenVinoInt8"

_INLINE_BYTES = 1 << 20  # weights beside the graph are written and mapped in a third of the time
_BUILD_LIMIT_S = 300.0
_SEARCH_LIMIT_S = 3600.0
_SAMPLES = 300


@dataclass
class Session:
    """One run. `folder` is scratch space that goes away with it; `cache` stays."""

    options: Options
    progress: Progress
    graph: OnnxGraph
    recognition: Recognition
    selection: Selection
    target: Target
    workload: Workload
    splits: Splits | None
    cache: Path
    folder: Path
    builder: Worker
    timer: Worker
    log: Path | None = None
    traffic: Traffic | None = None
    variants_timed: int = 0
    notes: list[str] = field(default_factory=list)
    siblings: tuple[Sibling, ...] = ()
    forms: dict[str, FormChoice] = field(default_factory=dict)  # by variant, see `rewriter.search.forms`

    @property
    def engine(self) -> str:
        """The TVM runtime that was asked for: in processes here, or on the device that a tracker lends."""
        if self.target.remote:
            return TVM_REMOTE
        return {"none": TVM_UNTUNED, "templates": TVM, "metaschedule": TVM_METASCHEDULE}[self.options.tuner]

    @property
    def pricing_engine(self) -> str:
        """What options are priced with: their many shapes take default tiles, and only what may be kept is tuned."""
        return TVM_UNTUNED if self.engine == TVM else self.engine

    @property
    def lowerable(self) -> tuple[Any, ...]:
        """The sites that may be rewritten."""
        return tuple(site for site in self.recognition.sites if site.state is State.LOWERABLE)

    def build(
        self, graph: OnnxGraph, name: str, runtime: str = "", shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Path:
        """Build an artifact in a guarded worker, for `engine` unless told; `ModelError` when that fails."""
        runtime = runtime or self.engine
        saved = graph.save(self.folder / f"{name}.onnx", _INLINE_BYTES)
        wanted = fitted_shapes(self.workload.shapes, graph.inputs) if shapes is None else shapes
        place = self.folder / "builds" / f"{name}-{runtime.rpartition(':')[2]}"
        samples = self.samples() if runtime == OPENVINO_INT8 else None
        arguments = (runtime, saved, dict(wanted), place, self.target, self.cache / "compiled", samples)
        limit_s = _SEARCH_LIMIT_S if runtime == TVM_METASCHEDULE else _BUILD_LIMIT_S
        build, told = f"{jobs.__name__}:build", self.notes.append
        built = call_twice(self.builder, build, *arguments, timeout_s=limit_s, told=told)
        if isinstance(built, WorkerFailure):
            raise ModelError(f"building {name} with {runtime.rpartition(':')[2]} failed: {built}", "See optimize.log")
        return Path(built)

    def samples(self) -> Path | None:
        """Calibration samples as a file, for runtimes that look at some; None without data."""
        if self.splits is None:
            return None
        path = self.folder / "samples.npz"
        if not path.exists():
            data = self.splits.calibrate
            rows = np.random.default_rng(self.options.seed).permutation(len(data))[:_SAMPLES]
            arrays: dict[str, Any] = {name: array[rows] for name, array in data.inputs.items()}
            np.savez(path, **arrays)
        return path


def default_cache() -> Path:
    """Where measurements and builds are kept unless ``--cache-dir`` says otherwise."""
    return platformdirs.user_cache_path("attention-rewriter")


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A folder below the cache that is removed afterwards; what killed runs left there is removed first."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob("run-*"):
        owner = left.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
