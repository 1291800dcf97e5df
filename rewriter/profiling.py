"""`optimize profile`: which kernels of a compiled model take the time, and how far each is from what is possible."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter.compiling import compile_only
from rewriter.core.errors import ModelError
from rewriter.core.options import Options
from rewriter.runtimes.tvm.artifact import MANIFEST, read_manifest
from rewriter.runtimes.workers import Worker, WorkerFailure

_LIMIT_S = 600.0
_PROFILE = "rewriter.runtimes.tvm.profile:profile_folder"


def profile(path: Path, options: Options, runs: int = 20) -> dict[str, Any]:
    """Profile a folder that `optimize` wrote, or a model, which is compiled first. Raises `UserError`."""
    if (path / MANIFEST).is_file():
        return _profiled(path, runs, options.shapes)
    with tempfile.TemporaryDirectory(prefix="profile-") as place:
        compiled = compile_only(path, _compiling(options, Path(place) / "compiled"))
        return _profiled(compiled.folder, runs, options.shapes) | {"folder": str(path)}


def _compiling(options: Options, folder: Path) -> Options:
    shown = {"target": options.target, "shapes": options.shapes, "threads": options.threads, "plan": options.plan}
    return Options(**shown, cache_dir=options.cache_dir, output=folder, compile_only=True)  # type: ignore[arg-type]


def _profiled(folder: Path, runs: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    threads = int(read_manifest(folder)["threads"])
    with Worker("profile", threads) as worker:
        found = worker.call(_PROFILE, folder, runs, dict(shapes), timeout_s=_LIMIT_S)
    if isinstance(found, WorkerFailure):
        raise ModelError(f"profiling {folder} failed: {found}", "Check the artifact with optimize verify")
    return dict(found)
