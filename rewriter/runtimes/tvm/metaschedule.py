"""MetaSchedule for kernels without a template: it proposes schedules, a guarded worker builds, checks and times them.

What is found lives in the tuning database as the scheduled kernel itself, written whenever a better one was measured,
so a killed search keeps its best and asking again costs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import inspect
import logging
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.utils import derived_object
from tvm.relax.backend.cpu_generic import pipeline
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

from rewriter.core.target import Target
from rewriter.runtimes.tvm.database import Subject, TuningDatabase
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.workers import Worker, WorkerFailure, pinnable

TRIALS = 32  # per kernel
WORTH_S = 20e-6  # a kernel that takes less by default is left alone
DECIDES = 0.97
_PER_ROUND = 8
_LIMIT_S = 60.0
_MEMORY_BYTES = 8 << 30
_OPAQUE = 8  # relax: never fuse into or with this kernel
_RUN = "rewriter.runtimes.tvm.candidate:measure"
_logger = logging.getLogger("rewriter")


class MetaScheduler:
    """Tunes the kernels of modules; `trials` candidates are measured for each kernel that the database lacks."""

    def __init__(self, target: Target, database: TuningDatabase, trials: int = TRIALS) -> None:
        self.target, self.database, self.trials = target, database, trials

    def polish(self, functions: Any, templates: Mapping[str, int]) -> Any:
        """The module with better schedules for kernels that are not `templates`."""
        described = tvm_target(self.target)
        with described:
            passes = [*pipeline.library_dispatch_passes(described), *pipeline.legalize_passes(described)]
            module = tvm.transform.Sequential(passes)(functions)
        with tempfile.TemporaryDirectory(prefix="metaschedule-") as folder, self._worker() as worker:
            for variable, function in _untuned(module, templates):
                better = self._tuned(function, worker, Path(folder))
                if better is not None:
                    module[variable] = better.with_attr("op_pattern", _OPAQUE).without_attr("global_symbol")
        return module

    def _worker(self) -> Worker:
        return Worker("metaschedule", self.target.threads, _MEMORY_BYTES, cores=pinnable(self.target.threads))

    def _tuned(self, function: Any, worker: Worker, folder: Path) -> Any:
        """A better schedule of one kernel, from the database or measured now; None if the default stays."""
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        subject = self.subject(module)
        known: Mapping[str, Any] | None = self.database.find(subject)
        if known is None or int(known["trials"]) < self.trials:
            known = self._search(module, subject, worker, folder, known)
        if known is None or not known["kernel"] or known["seconds"] >= DECIDES * known["default_seconds"]:
            return None
        return unpacked(known["kernel"])["main"]

    def subject(self, module: Any) -> Subject:
        """What a kernel is in the database: its content, the shape of its result, dtype, target, TVM."""
        digest = hashlib.sha256(tvm.ir.save_json(module).encode()).hexdigest()[:24]
        info = ms.arg_info.ArgInfo.from_entry_func(module, False)[-1]
        return Subject.of(f"metaschedule:{digest}", [int(size) for size in info.shape], self.target, str(info.dtype))

    def _search(
        self, module: Any, subject: Subject, worker: Worker, folder: Path, known: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        plain = packed(module)
        default = worker.call(_RUN, plain, plain, self.target, timeout_s=_LIMIT_S)
        if isinstance(default, WorkerFailure):
            _logger.info("metaschedule: a kernel cannot be measured by default: %s", default)
            return None
        book = Book(self.database, subject, plain, float(default), dict(known or {}))
        if default < WORTH_S:
            return book.finish(self.trials)
        _load_intrinsics()
        context = ms.TuneContext(
            mod=module, target=tvm_target(self.target), space_generator="post-order-apply",
            search_strategy=ms.search_strategy.EvolutionarySearch(population_size=64, genetic_num_iters=2),
            task_name="main", rand_state=1, num_threads=1,
        )  # fmt: skip
        measurer = Measurer(worker, book, self.target)
        ms.tune.tune_tasks(
            tasks=[context], task_weights=[1.0], work_dir=str(folder),
            max_trials_global=self.trials - book.trials, num_trials_per_iter=_PER_ROUND,
            builder=measurer.builder(), runner=measurer.runner(), database=ms.database.MemoryDatabase(),
            cost_model="xgb" if find_spec("xgboost") else "random",
            # Without RemoveBuildArtifact, which would delete files that do not exist.
            measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()],
        )  # fmt: skip
        return book.finish(self.trials)


class Book:
    """The record of one kernel while it is searched: written whenever something better was measured."""

    def __init__(
        self, database: TuningDatabase, subject: Subject, plain: str, default_s: float, known: dict[str, Any]
    ) -> None:
        self.database, self.subject, self.plain = database, subject, plain
        start = {"kernel": "", "seconds": default_s, "default_seconds": default_s, "trials": 0, "failures": 0}
        self.record: dict[str, Any] = start | known
        if known:
            # Times of two runs do not compare, their ratio to the default does.
            self.record["seconds"] *= default_s / known["default_seconds"]
            self.record["default_seconds"] = default_s

    @property
    def trials(self) -> int:
        """Candidates measured so far, by this run and earlier ones."""
        return int(self.record["trials"])

    def take(self, kernel: str, seconds: float) -> None:
        """One candidate that was measured."""
        self.record["trials"] += 1
        if seconds < self.record["seconds"]:
            self.record |= {"kernel": kernel, "seconds": seconds}
            self.database.add(self.subject, self.record)

    def fail(self, kernel: str, reason: str) -> None:
        """One candidate that crashed, hung or computed something else: it is never chosen and never tried again."""
        self.record["trials"] += 1
        self.record["failures"] += 1
        self.database.add_failure(self.subject, content_of(kernel), reason)
        self.database.add(self.subject, self.record)

    def failure(self, kernel: str) -> str:
        """Why a candidate failed before; empty if it did not."""
        return self.database.failure(self.subject, content_of(kernel))

    def finish(self, trials: int) -> dict[str, Any]:
        """The final record; the search need not be repeated for as many trials."""
        self.record["trials"] = max(self.trials, trials)
        self.database.add(self.subject, self.record)
        return self.record


class Measurer:
    """A builder that only writes candidates down, and a runner that has a guarded worker build, check and time them."""

    def __init__(self, worker: Worker, book: Book, target: Target) -> None:
        self.worker, self.book, self.target = worker, book, target
        self.candidates: dict[str, str] = {}

    def builder(self) -> Any:
        """For MetaSchedule."""
        return _Builder(self)

    def runner(self) -> Any:
        """For MetaSchedule."""
        return _Runner(self)

    def keep(self, module: Any) -> str:
        """A name for a candidate."""
        name = f"candidate-{len(self.candidates)}"
        self.candidates[name] = packed(module)
        return name

    def measured(self, name: str) -> RunnerResult:
        """Seconds of a candidate, or why there are none."""
        kernel = self.candidates.pop(name)
        before = self.book.failure(kernel)
        if before:
            return RunnerResult(None, before)
        found = self.worker.call(_RUN, self.book.plain, kernel, self.target, timeout_s=_LIMIT_S)
        if isinstance(found, WorkerFailure):
            self.book.fail(kernel, str(found)[-300:])
            return RunnerResult(None, str(found)[-300:])
        self.book.take(kernel, float(found))
        return RunnerResult([float(found)], None)


@derived_object
class _Builder(PyBuilder):
    def __init__(self, measurer: Measurer) -> None:
        super().__init__()
        self.measurer = measurer

    def build(self, build_inputs: Sequence[Any]) -> list[BuilderResult]:
        """Nothing is built here."""
        return [BuilderResult(self.measurer.keep(one.mod), None) for one in build_inputs]


@derived_object
class _Ready(PyRunnerFuture):
    def __init__(self, value: RunnerResult) -> None:
        super().__init__()
        self.value = value

    def done(self) -> bool:
        """Always."""
        return True

    def result(self) -> RunnerResult:
        """What was measured."""
        return self.value


@derived_object
class _Runner(PyRunner):
    def __init__(self, measurer: Measurer) -> None:
        super().__init__()
        self.measurer = measurer

    def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
        """One after the other: candidates beside each other would disturb each other."""
        return [_Ready(self.measurer.measured(str(one.artifact_path))) for one in runner_inputs]


def _load_intrinsics() -> None:
    """Import TVM's tensor intrinsics. Parsing them asks for the module of a frame 26,000 times, each a scan of all."""
    original: Any = inspect.getmodule
    known: dict[str, Any] = {}

    def cached(item: Any, filename: str | None = None) -> Any:
        key = filename or getattr(getattr(item, "f_code", item), "co_filename", None)
        if key is None:
            return original(item, filename)
        if key not in known:
            known[key] = original(item, filename)
        return known[key]

    inspect.getmodule = cached  # type: ignore[assignment]
    try:
        importlib.import_module("tvm.s_tir.tensor_intrin")
    finally:
        inspect.getmodule = original


def _untuned(module: Any, templates: Mapping[str, int]) -> Iterator[tuple[Any, Any]]:
    for variable, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and variable.name_hint not in templates:
            yield variable, function


def content_of(kernel: str) -> str:
    """A candidate by its content, as short as a key should be."""
    return hashlib.sha256(kernel.encode()).hexdigest()[:24]


def packed(module: Any) -> str:
    """A module as text for the database and for workers."""
    return base64.b85encode(zlib.compress(tvm.ir.save_json(module).encode(), 9)).decode()


def unpacked(text: str) -> Any:
    """The inverse of `packed`."""
    return tvm.ir.load_json(zlib.decompress(base64.b85decode(text)).decode())
