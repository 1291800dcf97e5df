"""`optimize doctor`: is everything here that the optimizer needs, and does it work together?"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rewriter.core.errors import UserError

_PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
_NEEDED = ("torch", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi", "networkx", "numpy", "scipy", "onnx-ir")
_ROOM_BYTES = 2_000_000_000


def examine(cache: Path) -> dict[str, Any]:
    """``{"ok": bool, "checks": [{"check", "ok", "detail"}]}``; a failing check never stops the others."""
    checks = [
        _check("python", _python),
        _check("packages", _packages),
        _check("passes", _passes),
        _check("processor", _processor),
        _check("worker", _worker),
        _check("tvm", _tvm),
        _check("cache", lambda: _cache(cache)),
    ]
    return {"ok": all(check["ok"] for check in checks), "checks": checks}


def _check(name: str, run: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "detail": run()}
    except (UserError, ImportError, OSError, RuntimeError, ValueError, AttributeError) as problem:
        return {"check": name, "ok": False, "detail": f"{type(problem).__name__}: {problem}"}


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        raise RuntimeError(f"Python {platform.python_version()} is not supported; use 3.11 to 3.13")
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages() -> str:
    found = {name: metadata.version(name) for name in _NEEDED}
    for name, version in _PINNED.items():
        if found[name] != version:
            raise RuntimeError(f"{name} is {found[name]}, must be {version}: pip install {name}=={version}")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _passes() -> str:
    from rewriter.core.passes_registry import discover

    return ", ".join(discover())


def _processor() -> str:
    from rewriter.runtimes.tvm.target import detect

    target = detect("cpu", 1)
    caches = f"L1 {target.l1_bytes >> 10} KiB, L2 {target.l2_bytes >> 10} KiB, L3 {target.l3_bytes >> 20} MiB"
    return f"{target.name}, {target.cores} cores, {target.mcpu}, {target.vector_floats} floats per register, {caches}"


def _worker() -> str:
    from rewriter.runtimes.workers import Worker, WorkerFailure

    with Worker("doctor", 1) as worker:
        answer = worker.call("os:getpid", timeout_s=60.0)
        if isinstance(answer, WorkerFailure):
            raise RuntimeError(f"a worker process cannot start: {answer}")
        return f"worker processes start (pid {answer})"


def _tvm() -> str:
    from rewriter.runtimes.workers import Worker, WorkerFailure

    with Worker("doctor", 1) as worker:
        answer = worker.call("rewriter.runtimes.tvm.selfcheck:selfcheck", timeout_s=120.0)
        if isinstance(answer, WorkerFailure):
            raise RuntimeError(f"TVM does not work here: {answer}")
        return str(answer)


def _cache(cache: Path) -> str:
    cache.mkdir(parents=True, exist_ok=True)
    probe = cache / ".doctor"
    probe.write_text("")
    probe.unlink()
    free = shutil.disk_usage(cache).free
    if free < _ROOM_BYTES:
        raise RuntimeError(f"{cache} has {free / 1e9:.1f} GB free; {_ROOM_BYTES / 1e9:.0f} GB are needed")
    return f"{cache} is writable, {free / 1e9:.0f} GB free"
