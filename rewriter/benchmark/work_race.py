"""The race of one work at one number of threads, as a record that outlives it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
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


class WorkRaces:
    """Runs works and keeps their records in `results`; builds lie in `results`/scratch until a work is done."""

    def __init__(self, models: Path, results: Path, budget_s: float, say: Callable[[str], None]) -> None:
        self.models, self.results, self.budget_s, self.say = models, results, budget_s, say
        self.scratch = results / "scratch"
        self.code = code_fingerprint()

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
        try:
            material = prepare(work, self.models, folder)
            for count in missing:
                record = self._race(work, count, material, folder)
                path = self._path(work, count)
                path.with_suffix(".partial").write_text(json.dumps(record, indent=1) + "\n")
                path.with_suffix(".partial").replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, work: Work, threads: int) -> Path:
        return self.results / f"{work.name}@{threads}.json"

    def _race(self, work: Work, threads: int, material: Material, folder: Path) -> Record:
        self.say(f"{work.name}, {threads} thread(s)")
        target = detect("cpu", threads)
        refused: dict[str, str] = {}
        subjects: list[Subject] = []
        with Worker("builder", 1) as builder:
            for entrant in work.entrants:
                built = self._built(builder, entrant, material, folder, target)
                if isinstance(built, Path):
                    subjects.append(Subject(entrant.name, entrant.runtime, built, material.feeds))
                else:
                    refused[entrant.name] = built
        rules = Rules(budget_s=self.budget_s, most_rounds=60, reopen_every=6)
        result = race(subjects, threads=threads, rules=rules)
        refused |= {name: str(failure) for name, failure in result.failures.items()}
        first = work.entrants[0].name
        return {
            "work": work.name,
            "threads": threads,
            "code": self.code,
            "latency_s": {name: measured.latency_s().as_dict() for name, measured in result.items()},
            "ratios": _ratios(result, first),
            "rounds": len(result[first].blocks_s) if first in result else 0,
            "refused": refused,
            "environment": dict(next(iter(result.values())).environment) if result else {},
        }

    def _built(self, builder: Worker, entrant: Entrant, material: Material, folder: Path, target: Target) -> Path | str:
        """The artifact, or why there is none."""
        refusal = of_spec(entrant.runtime).available()
        if refusal is not None:
            return str(refusal)
        place = folder / "-".join(
            [entrant.name.replace(" ", "_"), *([str(target.threads)] if entrant.threaded else [])]
        )
        model = material.original if entrant.graph == "original" else material.exact[entrant.graph]
        arguments = (entrant.runtime, model, material.shapes, place, target, self.results / "cache", material.samples)
        built = builder.call(f"{jobs.__name__}:build", *arguments, timeout_s=_BUILD_LIMIT_S)
        return str(built) if isinstance(built, WorkerFailure) else Path(built)


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
