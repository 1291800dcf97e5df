"""``python -m models.matrix --tvm``: every graph of the tests' packs through TVM, and a table of what became of each.

Each graph is recognised, lowered, built and compared with ONNX Runtime in a worker with a time limit, so that a crash
costs one graph. Verdicts are kept beside the exports, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import onnx

from models.fixtures import read_pack
from models.tvm_coverage import Coverage
from rewriter.runtimes.workers import Worker, WorkerFailure

PACKS = Path(__file__).parent.parent / "tests" / "fixtures"
LIMIT_S = 180.0
CALLS_OF_A_WORKER = 40  # compiled functions are never given back


def run(folder: Path, families: Sequence[str] = ()) -> dict[str, Coverage]:
    """Verdicts by ``pack/cell``, printed as they come; what `folder` holds for the same code is not done again."""
    kept = folder / "tvm.jsonl"
    known = dict(_known(kept))
    found: dict[str, Coverage] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, Worker("tvm", 1) as worker, kept.open("a") as file:
        for number, (name, model) in enumerate(_graphs(families)):
            if name not in known:
                known[name] = _checked(worker, model, Path(place) / "model.onnx")
                file.write(json.dumps({"engine": engine(), "graph": name, **asdict(known[name])}) + "\n")
                file.flush()
            found[name] = known[name]
            print(line(name, found[name]), flush=True)
            if number % CALLS_OF_A_WORKER == CALLS_OF_A_WORKER - 1:
                worker.close()
    return found


def _graphs(families: Sequence[str]) -> Iterator[tuple[str, onnx.ModelProto]]:
    for path in sorted(PACKS.rglob("*.tar.xz")):
        for cell, model in sorted(read_pack(path).models.items()):
            if not families or cell.split(".")[0] in families:
                yield f"{path.name.removesuffix('.tar.xz')}/{cell}", model


def _checked(worker: Worker, model: onnx.ModelProto, path: Path) -> Coverage:
    onnx.save(model, path)
    done = worker.call("models.tvm_coverage:check", path, timeout_s=LIMIT_S)
    return Coverage("failed", 0, detail=str(done)) if isinstance(done, WorkerFailure) else done


def _known(path: Path) -> Iterator[tuple[str, Coverage]]:
    for text in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(text)
        if entry.pop("engine") == engine():
            yield entry.pop("graph"), Coverage(**entry)


def engine() -> str:
    """A digest of all code that a verdict depends on."""
    root = Path(__file__).parent.parent / "rewriter"
    files = [path for part in ("attention", "graph", "runtimes") for path in sorted((root / part).rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def line(name: str, coverage: Coverage) -> str:
    """One graph as a row."""
    return f"{name} | {coverage.verdict} | {coverage.sites} | {coverage.error:.1e} | {coverage.detail}"


def table(found: Iterable[tuple[str, Coverage]]) -> str:
    """A Markdown table: a row per pack, and a list of what is not ok."""
    counts: dict[str, Counter[str]] = {}
    worst: dict[str, float] = {}
    others = []
    for name, coverage in found:
        pack = name.partition("/")[0]
        counts.setdefault(pack, Counter()).update([coverage.verdict])
        if coverage.verdict == "ok":
            worst[pack] = max(worst.get(pack, 0.0), coverage.error)
        else:
            others.append(f"- {name}: {coverage.verdict}: {coverage.detail}")
    rows = ["| pack | graphs | agree | largest difference | named operator | wrong | failed |", "| --- " * 7 + "|"]
    for pack, count in counts.items():
        rest = (f"{count[verdict]}" for verdict in ("unsupported", "wrong", "failed"))
        cells = (pack, str(count.total()), str(count["ok"]), f"{worst.get(pack, 0.0):.0e}", *rest)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *others, ""])
