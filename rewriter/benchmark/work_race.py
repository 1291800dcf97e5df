"""The race of one work at one number of threads, as a record that outlives it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.benchmark.entrants import Entrant
from rewriter.benchmark.material import Material, prepare
from rewriter.benchmark.works import Work
from rewriter.core.measurement import speedup
from rewriter.core.target import Target
from rewriter.measurement.bench import Subject
from rewriter.measurement.race import Rules, race
from rewriter.runtimes import jobs
from rewriter.runtimes.base import of_spec
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure

_BUILD_LIMIT_S = 300.0
Record = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """Who can race, and why the others cannot."""

    subjects: list[Subject]
    refused: dict[str, str]


class WorkRaces:
    """Runs works and keeps their records in `results`; builds lie in `results`/scratch until a work is raced."""

    def __init__(self, models: Path, results: Path, budget_s: float, say: Callable[[str], None]) -> None:
        self.models, self.results, self.budget_s, self.say = models, results, budget_s, say
        self.code = code_fingerprint()
        self.scratch = results / f"scratch-{self.code}"  # what other sources built is of no use

    def record(self, work: Work, threads: int) -> Record | None:
        """What an earlier run found, or None."""
        path = self._path(work, threads)
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, work: Work, threads: tuple[int, ...], again: bool = False) -> None:
        """Race a work at each number of threads that has no record yet. Raises `UserError` for a missing model."""
        missing = [count for count in threads if again or self.record(work, count) is None]
        if not missing:
            return
        folder = self.scratch / work.name
        material = prepare(work, self.models, folder)
        for count in missing:
            record = self._race(work, count, self._build(work, count, material, folder))
            path = self._path(work, count)
            path.with_suffix(".partial").write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".partial").replace(path)
        shutil.rmtree(folder, ignore_errors=True)

    def build(self, work: Work, threads: tuple[int, ...]) -> None:
        """Only build what `run` will race."""
        folder = self.scratch / work.name
        material = prepare(work, self.models, folder)
        for count in threads:
            if self.record(work, count) is None:
                self._build(work, count, material, folder)

    def _path(self, work: Work, threads: int) -> Path:
        return self.results / f"{work.name}@{threads}.json"

    def _build(self, work: Work, threads: int, material: Material, folder: Path) -> Built:
        """Every artifact that is not there yet."""
        self.say(f"building {work.name}, {threads} thread(s)")
        target, built = detect("cpu", threads), Built([], {})
        with Worker("builder", 1) as builder:
            for entrant in work.entrants:
                found = self._built(builder, entrant, material, folder, target)
                if isinstance(found, Path):
                    built.subjects.append(Subject(entrant.name, entrant.runtime, found, material.feeds))
                else:
                    built.refused[entrant.name] = found
        return built

    def _built(self, builder: Worker, entrant: Entrant, material: Material, folder: Path, target: Target) -> Path | str:
        """The artifact, or why there is none."""
        refusal = of_spec(entrant.runtime).available()
        if refusal is not None:
            return str(refusal)
        name = "-".join([entrant.name.replace(" ", "_"), *([str(target.threads)] if entrant.threaded else [])])
        place, done = folder / name, folder / f"{name}.done"
        if done.exists():
            return Path(done.read_text())
        shutil.rmtree(place, ignore_errors=True)
        model = material.original if entrant.graph == "original" else material.exact[entrant.graph]
        arguments = (entrant.runtime, model, material.shapes, place, target, self.results / "cache", material.samples)
        built = builder.call(f"{jobs.__name__}:build", *arguments, timeout_s=_BUILD_LIMIT_S)
        if isinstance(built, WorkerFailure):
            return str(built)
        done.write_text(str(built))
        return Path(built)

    def _race(self, work: Work, threads: int, built: Built) -> Record:
        self.say(f"racing {work.name}, {threads} thread(s)")
        result = race(built.subjects, threads=threads, rules=Rules(budget_s=self.budget_s, most_rounds=60))
        first = work.entrants[0].name
        return {
            "work": work.name,
            "threads": threads,
            "code": self.code,
            "latency_s": {name: measured.latency_s().as_dict() for name, measured in result.items()},
            "ratios": _ratios(result, first),
            "rounds": len(result[first].blocks_s) if first in result else 0,
            "refused": built.refused | {name: str(failure) for name, failure in result.failures.items()},
            "environment": dict(next(iter(result.values())).environment) if result else {},
        }


def _ratios(result: Mapping[str, Any], first: str) -> Record:
    """How many times faster ours is than each of the others."""
    if first not in result:
        return {}
    return {name: speedup(other, result[first]).as_dict() for name, other in result.items() if name != first}


def code_fingerprint() -> str:
    """Of this package's sources: records of other sources are not of what is here."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted((root / "runtimes").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
