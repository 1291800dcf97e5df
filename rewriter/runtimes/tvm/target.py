"""The processor this runs on: what it is, what it can do, and where each fact was read."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rewriter.core.errors import OptionError
from rewriter.core.target import Target

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Flags in the order of their worth to the kernels; what a target may not use is found by leaving flags out.
RELEVANT = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
V4 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
V3 = frozenset({"avx2", "fma"})
LLVM_NAMES = {"avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16"}
LOCAL_KINDS = ("cpu", "llvm", "native")
DEFAULT_L1, DEFAULT_L2, DEFAULT_L3 = 32 << 10, 1 << 20, 16 << 20


def detect(text: str = "cpu", threads: int | None = None) -> Target:
    """The target that a text names: ``cpu``, ``llvm``, ``llvm -mcpu=NAME``, or the JSON of a TVM target.

    `threads` is how many the artifact will use, one if not given. Raises `OptionError` for anything that this
    machine cannot run.
    """
    wanted = _parse(text)
    if wanted["kind"] not in LOCAL_KINDS:
        raise OptionError(
            f"target {text!r} needs a device that this machine does not have", "Use --target cpu for this processor"
        )
    if "-mtriple" in text or wanted.get("mtriple"):
        raise OptionError(f"target {text!r} is for another machine", "Use --target cpu for this processor")
    arch, flags, name, cores = platform.machine(), _flags(), _model_name(), _cores()
    features = tuple(flag for flag in RELEVANT if flag in flags)
    mcpu = str(wanted.get("mcpu") or _mcpu(arch, frozenset(features)))
    features = _allowed(mcpu, features)
    if threads is not None and threads < 1:
        raise OptionError(f"{threads} threads are not possible", "Give at least one")
    caches = {level: _cache_bytes(level) for level in (1, 2, 3)}
    lanes = _lanes(arch, features)
    sources = {
        "name": str(CPUINFO), "features": str(CPUINFO), "cores": "sched_getaffinity",
        "mcpu": "given" if wanted.get("mcpu") else "chosen from the features",
        "vector_floats": "features", "registers": "features",
        **{f"l{level}_bytes": str(CACHES) if size else "assumed" for level, size in caches.items()},
    }  # fmt: skip
    return Target(
        "llvm", name, mcpu, arch, cores, threads or 1, lanes, 16 if lanes == 8 else 32,
        caches[1] or DEFAULT_L1, caches[2] or DEFAULT_L2, caches[3] or DEFAULT_L3, features, sources,
    )  # fmt: skip


def tvm_target(target: Target) -> Any:
    """The TVM target object for one of ours."""
    import tvm

    attributes = [f"+{LLVM_NAMES[feature]}" for feature in target.features if feature in LLVM_NAMES]
    description: dict[str, Any] = {"kind": target.kind, "mcpu": target.mcpu, "num-cores": target.threads}
    return tvm.target.Target({**description, "mattr": attributes} if attributes else description)


def missing_features(required: tuple[str, ...]) -> tuple[str, ...]:
    """Which of these instruction sets the processor we run on does not have."""
    have = _flags()
    return tuple(flag for flag in required if flag not in have)


def _parse(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(
                f"target {text!r} is not valid JSON: {error}", 'Write it like {"kind": "llvm"}'
            ) from error
        return {"kind": "llvm", **found}
    words = text.split()
    if not words:
        raise OptionError("the target is empty", "Use --target cpu")
    wanted: dict[str, Any] = {"kind": words[0]}
    for word in words[1:]:
        key, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not equals:
            raise OptionError(f"cannot read {word!r} in target {text!r}", "Write it like llvm -mcpu=x86-64-v3")
        wanted[key] = value
    return wanted


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
    if arch not in ("x86_64", "AMD64"):
        return "generic"
    return "x86-64-v4" if features >= V4 else "x86-64-v3" if features >= V3 else "x86-64-v2"


def _allowed(mcpu: str, features: tuple[str, ...]) -> tuple[str, ...]:
    """The features that code for `mcpu` may use: naming an older instruction set means to do without the newer ones."""
    if mcpu in ("x86-64", "x86-64-v2"):
        return ()
    if mcpu in ("x86-64-v3", "haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"):
        return tuple(feature for feature in features if feature in V3)
    return features


def _lanes(arch: str, features: tuple[str, ...]) -> int:
    if "avx512f" in features:
        return 16
    return 8 if "avx2" in features else 4


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
