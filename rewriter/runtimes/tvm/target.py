"""The processor this runs on: what it is, what it can do, and where each fact was read."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewriter.core.errors import OptionError
from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.elsewhere import describe
from rewriter.runtimes.tvm.instruction_sets import (
    FEATURES,
    architecture,
    flags_of,
    of_processor,
    registers,
    vector_floats,
)
from rewriter.runtimes.tvm.target_text import LOCAL_KINDS, TargetText

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
V4 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
V3 = frozenset({"avx2", "fma"})
DEFAULT_L1, DEFAULT_L2, DEFAULT_L3 = 32 << 10, 1 << 20, 16 << 20


def detect(text: str = "cpu", threads: int | None = None, away: bool = False) -> Target:
    """The target that a text names: ``cpu``, ``llvm``, ``llvm -mcpu=NAME``, or the JSON of a TVM target.

    `threads` is how many the artifact will use, one if not given. `away`: it need not be this machine, so
    ``llvm -mtriple=aarch64-linux-gnu`` and ``cuda -arch=sm_90`` are targets too. Raises `OptionError` for anything that
    cannot be served, and unless `away` for anything that this machine cannot run.
    """
    wanted = TargetText.parse(text)
    if threads is not None and threads < 1:
        raise OptionError(f"{threads} threads are not possible", "Give at least one")
    if wanted.kind not in LOCAL_KINDS or "mtriple" in wanted.options:
        described = None if wanted.kind == "cuda" and not away else describe(wanted, threads or 1)
        if described is None or not away:
            why = (
                "needs a device that this machine does not have" if wanted.kind == "cuda" else "is for another machine"
            )
            hint = "Compile for it with --compile-only, or time it there with --rpc HOST:PORT --key NAME"
            raise OptionError(f"target {text!r} {why}, so nothing can be timed", hint)
        return described
    return _this_machine(wanted, threads or 1, away)


def _this_machine(wanted: TargetText, threads: int, away: bool) -> Target:
    arch, flags, name, cores = architecture(platform.machine()), _flags(), _model_name(), _cores()
    present = tuple(flag for flag in FEATURES.get(arch, {}) if flag in flags)
    # The matrix unit counts only where the system lets this process use it; without it kernels do without.
    features = present if not amx.among(present) or amx.permitted() else amx.without(present)
    mcpu = wanted.options.get("mcpu") or _mcpu(arch, frozenset(features))
    if "mcpu" in wanted.options or wanted.attributes:
        named = flags_of(arch, of_processor(mcpu, attributes=wanted.attributes))
        missing = [flag for flag in named if flag not in present]
        if missing and away:
            return describe(replace(wanted, options={**wanted.options, "mtriple": f"{arch}-linux-gnu"}), threads)
        if missing:
            hint = "Use --target cpu, or build for another machine with --compile-only"
            raise OptionError(f"target {wanted.text!r} needs {', '.join(missing)}, which this processor lacks", hint)
        # Naming an older instruction set means to do without the newer ones.
        features = tuple(flag for flag in features if flag in named)
    caches = {level: _cache_bytes(level) for level in (1, 2, 3)}
    sources = {
        "name": str(CPUINFO), "features": str(CPUINFO), "cores": "sched_getaffinity",
        "mcpu": "given" if "mcpu" in wanted.options else "chosen from the features",
        "vector_floats": "features", "registers": "features",
        **{f"l{level}_bytes": str(CACHES) if size else "assumed" for level, size in caches.items()},
    }  # fmt: skip
    return Target(
        "llvm", name, mcpu, arch, cores, threads, vector_floats(arch, features), registers(arch, features),
        caches[1] or DEFAULT_L1, caches[2] or DEFAULT_L2, caches[3] or DEFAULT_L3, features, sources,
    )  # fmt: skip


def tvm_target(target: Target) -> Any:
    """The TVM target object for one of ours."""
    import tvm

    if target.kind == "cuda":
        limits = {
            "max_num_threads": 1024, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
        }  # fmt: skip
        host = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
        return tvm.target.Target({"kind": "cuda", "arch": target.mcpu, **limits}, host=host)
    names = FEATURES.get(target.arch, {})
    attributes = [f"+{names[feature]}" for feature in target.features if feature in names]
    description: dict[str, Any] = {"kind": target.kind, "mcpu": target.mcpu, "num-cores": target.threads}
    if target.triple:
        description["mtriple"] = target.triple
    return tvm.target.Target({**description, "mattr": attributes} if attributes else description)


def missing_features(required: tuple[str, ...]) -> tuple[str, ...]:
    """Which of these instruction sets the processor we run on does not have."""
    have = _flags()
    return tuple(flag for flag in required if flag not in have)


def _flags() -> frozenset[str]:
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _model_name() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mcpu(arch: str, features: frozenset[str]) -> str:
    """An instruction set by name, never a processor: LLVM's guess of the processor is wrong in virtual machines."""
    if arch != "x86_64":
        return "generic"
    return "x86-64-v4" if features >= V4 else "x86-64-v3" if features >= V3 else "x86-64-v2"


def _cache_bytes(level: int) -> int:
    for index in sorted(CACHES.glob("index*")) if CACHES.exists() else []:
        try:
            kind, found = (index / "type").read_text().strip(), int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if found == level and kind in ("Data", "Unified"):
            return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return 0
