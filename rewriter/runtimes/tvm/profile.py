"""Where the time of a compiled model goes: the virtual machine calls back before and after every kernel."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.errors import ModelError
from rewriter.core.target import Target
from rewriter.runtimes.tvm.load import TvmExecutable, load
from rewriter.runtimes.tvm.peak import bytes_per_s, products_per_s
from rewriter.runtimes.tvm.target import detect

GO_ON = 0  # anything else makes the virtual machine skip the call
MACHINE = "vm.builtin."


@dataclass
class Spent:
    """What one kernel or builtin took, over all runs; `nbytes` is what one call reads and writes at least."""

    seconds: float = 0.0
    calls: int = 0
    nbytes: int = 0


def profile(executable: TvmExecutable, feeds: Mapping[str, NDArray[Any]], runs: int = 10) -> dict[str, float]:
    """Seconds per run of every kernel and builtin, the largest first; the callback itself costs about 1 us per call."""
    spent = observe(executable, feeds, runs)
    return {name: one.seconds / runs for name, one in sorted(spent.items(), key=lambda item: -item[1].seconds)}


def observe(executable: TvmExecutable, feeds: Mapping[str, NDArray[Any]], runs: int) -> dict[str, Spent]:
    """What every kernel and builtin took over `runs` runs, after one that does not count."""
    spent: dict[str, Spent] = defaultdict(Spent)
    begun: list[float] = []

    def watch(_function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        one = spent[str(name)]
        if before:
            if not one.calls and not str(name).startswith(MACHINE):
                one.nbytes = _moved(str(name), arguments)
            begun.append(time.perf_counter())
        else:
            one.seconds += now - begun.pop()
            one.calls += 1
        return GO_ON

    once = executable.bind(feeds)
    once()
    executable.machine().set_instrument(watch)
    try:
        for _ in range(runs):
            once()
    finally:
        executable.forget_machine()
    return dict(spent)


def _moved(name: str, arguments: Sequence[Any]) -> int:
    """Bytes that one call reads and writes at least; of a table only the rows that come out."""
    if name.startswith("gather"):
        return 2 * _nbytes(arguments[-1])
    return sum(_nbytes(argument) for argument in arguments)


def _nbytes(argument: Any) -> int:
    shape, dtype = getattr(argument, "shape", None), getattr(argument, "dtype", None)
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(str(dtype)).itemsize if shape is not None else 0


def profile_folder(folder: Path, runs: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """In a worker: every kernel of an artifact with what it achieves against what this processor can do.

    Integers are one and other inputs normal; `shapes` defaults to the largest the artifact was built for.
    """
    executable = load(folder)
    feeds = drawn(executable, shapes)
    spent = observe(executable, feeds, runs)
    work: Mapping[str, int] = executable.manifest.get("work", {})
    peaks = _peaks(executable.manifest, work)
    kernels = [_row(name, one, runs, work.get(name, 0), peaks) for name, one in spent.items()]
    own = [row for row in kernels if not row["kernel"].startswith(MACHINE)]
    machine_s = sum(row["seconds"] for row in kernels if row["kernel"].startswith(MACHINE))
    total_s = sum(row["seconds"] for row in own) + machine_s
    for row in own:
        row["share"] = row["seconds"] / total_s
    return {
        "folder": str(folder),
        "shapes": {name: list(array.shape) for name, array in feeds.items()},
        "threads": executable.manifest["threads"],
        "runs": runs,
        "seconds": total_s,
        "virtual_machine_seconds": machine_s,
        "peaks": peaks,
        "kernels": sorted(own, key=lambda row: -row["seconds"]),
    }


def drawn(executable: TvmExecutable, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Inputs of these shapes, or of the largest bucket."""
    rng, found = np.random.default_rng(0), {}
    unknown = set(shapes) - {spec["name"] for spec in executable.inputs}
    if unknown:
        raise ModelError(f"the artifact has no input {min(unknown)!r}", "Name one of its inputs with --shape")
    for spec in executable.inputs:
        shape = tuple(shapes.get(spec["name"], executable.buckets[-1]["inputs"][spec["name"]]))
        kind = np.dtype(spec["dtype"])
        values = rng.standard_normal(shape) if kind.kind == "f" else np.ones(shape)
        found[spec["name"]] = values.astype(kind)
    return found


def _peaks(manifest: Mapping[str, Any], work: Mapping[str, int]) -> dict[str, float]:
    """Operations per second by number format, for the formats in use, and bytes per second."""
    target = _built_for(manifest)
    formats = [form for form in ("fp32", "bf16", "int8") if form == "fp32" or any(form in name for name in work)]
    found = {form: products_per_s(target, form) for form in formats if target.multiplies(form)}  # type: ignore[arg-type]
    return found | {"bytes": bytes_per_s()}


def _built_for(manifest: Mapping[str, Any]) -> Target:
    """The target of an artifact that runs here."""
    here, asked = detect("cpu", int(manifest["threads"])), manifest["target"]["mcpu"]
    return here if asked == here.mcpu else detect(f"llvm -mcpu={asked}", int(manifest["threads"]))


def _row(name: str, one: Spent, runs: int, operations: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    per_call_s = one.seconds / max(1, one.calls)
    form = next((form for form in ("bf16", "int8") if form in name and form in peaks), "fp32")
    floor_s = max(operations / peaks[form], one.nbytes / peaks["bytes"])
    return {
        "kernel": name,
        "calls": one.calls // runs,
        "seconds": one.seconds / runs,
        "gflops_per_s": operations / per_call_s / 1e9,
        "gbytes_per_s": one.nbytes / per_call_s / 1e9,
        "bound": "compute" if operations / peaks[form] >= one.nbytes / peaks["bytes"] else "memory",
        "of_roofline": floor_s / per_call_s,
    }
