"""Targets that are not this machine: code is compiled for them here, from their description alone."""

from __future__ import annotations

import re

from rewriter.core.errors import OptionError
from rewriter.core.target import Target
from rewriter.runtimes.tvm import instruction_sets
from rewriter.runtimes.tvm.target_text import LOCAL_KINDS, TargetText

SERVED = ("x86_64", "aarch64")
L1, L2, L3 = 32 << 10, 512 << 10, 2 << 20  # of a small processor; a remote device is not asked for its caches
_CUDA_ARCH = re.compile(r"sm_(\d{2,3})([af]?)")
_CUDA_KNOWN = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)
_GIVEN = "given"


def describe(wanted: TargetText, threads: int) -> Target:
    """The target that a text describes. Raises `OptionError` for what TVM does not have or the kernels cannot serve."""
    if wanted.kind == "cuda":
        return _cuda(wanted, threads)
    if wanted.kind in LOCAL_KINDS:
        return _processor(wanted, threads)
    raise unknown_kind(wanted)


def unknown_kind(wanted: TargetText) -> OptionError:
    """The error for a kind of target that is not served: TVM does not have it, or the kernels do not fit it."""
    import tvm

    served = "Served are llvm for x86-64 and AArch64, and cuda to compile for"
    if wanted.kind in map(str, tvm.target.Target.list_kinds()):
        return OptionError(f"TVM has the target {wanted.kind!r}, but the kernels here cannot serve it", served)
    return OptionError(f"TVM has no target {wanted.kind!r}", served)


def _processor(wanted: TargetText, threads: int) -> Target:
    triple = wanted.options.get("mtriple", "")
    arch = instruction_sets.architecture(triple.partition("-")[0])
    if arch not in SERVED:
        raise OptionError(
            f"the kernels cannot serve {triple or 'a target without -mtriple'}", f"Served are {', '.join(SERVED)}"
        )
    mcpu = wanted.options.get("mcpu", "x86-64-v3" if arch == "x86_64" else "generic")
    attributes = instruction_sets.of_processor(mcpu, triple, wanted.attributes)
    features = instruction_sets.flags_of(arch, attributes)
    if arch == "aarch64" and "asimd" not in features:
        raise OptionError(f"target {wanted.text!r} has no NEON, which the kernels need", "Leave -neon out")
    facts = ("mcpu", "features", "vector_floats", "registers")
    sources = dict.fromkeys(facts, _GIVEN) | dict.fromkeys(("l1_bytes", "l2_bytes", "l3_bytes", "cores"), "assumed")
    return Target(
        "llvm", f"{triple} {mcpu}", mcpu, arch, threads, threads, instruction_sets.vector_floats(arch, features),
        instruction_sets.registers(arch, features), L1, L2, L3, features, sources, triple,
    )  # fmt: skip


def _cuda(wanted: TargetText, threads: int) -> Target:
    arch = wanted.options.get("arch", "")
    match = _CUDA_ARCH.fullmatch(arch)
    if not match or int(match[1]) not in _CUDA_KNOWN or (match[2] and int(match[1]) < 90):
        raise OptionError(f"{arch or 'no arch'} is not a GPU architecture in {wanted.text!r}", "Write cuda -arch=sm_90")
    sources = {"mcpu": _GIVEN, "cores": "assumed"}
    return Target("cuda", f"cuda {arch}", arch, "cuda", 1, threads, 1, 32, L1, L2, L3, (), sources)
