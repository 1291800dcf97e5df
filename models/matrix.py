"""``python -m models.matrix``: every family by every exporter, what is recognised in it, and what others recognise.

Exports and the verdicts of others are kept in a folder and made only once, so that a run goes on where it was stopped.
Exporters and other recognisers work in processes of their own with a time limit: a crash or a hang costs one cell. The
rows have true attentions, ours by state, and how many ONNX Runtime's transformers optimizer (told the right model type)
and onnxscript's fusions turn into one operator, with a mark where their graph no longer computes the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx

from models.cells import PLAIN, Cell, cells, family_of, record_failure
from models.fixtures import Pack, meaning, write_pack
from models.rivals import RIVALS, Rival, Verdict
from models.summary import Row, text
from rewriter.runtimes.workers import Worker, WorkerFailure

LIMIT_S = 180.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what is missing, recognise, compare, print; optionally write the tests' packs."""
    options = _options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tvm:
        return _through_tvm(options)
    variants = [name for name in options.variants.split(",") if name]
    chosen = list(cells(variants, [name for name in options.families.split(",") if name]))
    rows: list[Row] = []
    with Worker("exporter", 1) as exporter, Worker("rival", 1) as rival:
        print("graph | true | found | mapped | lowerable | optimizer | onnxscript")
        for cell in chosen:
            row = _row(cell, options.output, exporter, None if options.ours else rival)
            rows.append(row)
            print(row, flush=True)
    print("\n" + text(rows))
    if options.summary is not None:
        options.summary.write_text(text(rows))
    if options.pack is not None:
        write_packs(options.pack, options.output, chosen)
    return 0


def _through_tvm(options: argparse.Namespace) -> int:
    """1 if a graph was computed wrongly or a process was lost; operators that TVM cannot run are only listed."""
    from models.tvm_matrix import run, table

    found = run(options.output, [name for name in options.families.split(",") if name])
    written = table(found.items())
    print("\n" + written)
    if options.summary is not None:
        options.summary.write_text(written)
    return int(any(coverage.verdict in ("wrong", "failed") for coverage in found.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/matrix"), help="where exports are kept")
    parser.add_argument("--variants", default=",".join(PLAIN), help="exporters and opsets, by commas")
    parser.add_argument("--families", default="", help="names by commas (default: all)")
    parser.add_argument("--ours", action="store_true", help="leave the other recognisers out")
    parser.add_argument("--summary", type=Path, help="also write the summary table into this file")
    parser.add_argument("--pack", type=Path, help="also write packs for the tests into this folder")
    parser.add_argument("--tvm", action="store_true", help="instead, run the graphs of the tests' packs with TVM")
    return parser.parse_args(arguments)


def _row(cell: Cell, folder: Path, exporter: Worker, rival: Worker | None) -> Row:
    path = cell.path(folder)
    if not path.exists() and not cell.failure(folder):
        done = exporter.call("models.cells:make", cell, folder, timeout_s=LIMIT_S)
        if isinstance(done, WorkerFailure):
            record_failure(cell, folder, str(done))
    if not path.exists():
        return Row(cell, family_of(cell), failure=cell.failure(folder))
    states = exporter.call("models.matrix:ours", path, timeout_s=LIMIT_S)
    if isinstance(states, WorkerFailure):
        return Row(cell, family_of(cell), failure=f"recognition: {states}")
    verdicts = {name: _verdict(name, cell, path, rival) for name in RIVALS} if rival is not None else {}
    return Row(cell, family_of(cell), states, verdicts)


def ours(path: Path) -> dict[str, int]:
    """How many attentions are found, mapped and lowerable; each state includes the later ones."""
    from rewriter.attention.recognise import recognise
    from rewriter.core.site import State
    from rewriter.graph.onnx import load

    states = [site.state for site in recognise(load(path)).attention]
    lowerable = states.count(State.LOWERABLE)
    mapped = lowerable + states.count(State.MAPPED)
    return {"found": len(states), "mapped": mapped, "lowerable": lowerable}


def _verdict(name: Rival, cell: Cell, path: Path, worker: Worker) -> Verdict:
    """A rival's verdict on a graph, from an earlier run where there is one for this file."""
    kept = path.with_suffix(f".{name}.json")
    if kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime:
        return Verdict(**json.loads(kept.read_text()))
    verdict = worker.call("models.rivals:judge", name, cell, path, timeout_s=LIMIT_S)
    if isinstance(verdict, WorkerFailure):
        verdict = Verdict(0, "failed", str(verdict)[:200])
    assert isinstance(verdict, Verdict)
    kept.write_text(json.dumps(asdict(verdict)))
    return verdict


def write_packs(target: Path, folder: Path, chosen: Sequence[Cell]) -> None:
    """Write the packs of these cells. A graph that another cell also says is kept once."""
    target.mkdir(parents=True, exist_ok=True)
    first: dict[str, str] = {}
    packs: dict[str, Pack] = {}
    for cell in chosen:
        pack = packs.setdefault(cell.pack, Pack({}, {}, {}))
        if not cell.path(folder).exists():
            pack.failed[cell.name] = cell.failure(folder)
            continue
        model = onnx.load(cell.path(folder))
        like = first.setdefault(meaning(model), cell.name)
        if like == cell.name:
            pack.models[cell.name] = model
        else:
            pack.same[cell.name] = like
    for name, pack in packs.items():
        write_pack(target / f"{name}.tar.xz", pack)


if __name__ == "__main__":
    sys.exit(main())
