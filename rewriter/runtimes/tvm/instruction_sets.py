"""Which instruction sets there are, by the names of Linux and of LLVM, and what a processor's name stands for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.core.errors import OptionError

# What the kernels use or LLVM may use for them: the flag in /proc/cpuinfo, and the attribute in LLVM.
FEATURES: Mapping[str, Mapping[str, str]] = {
    "x86_64": {
        "avx2": "avx2", "fma": "fma", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512vl": "avx512vl",
        "avx512dq": "avx512dq", "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "amx_tile": "amx-tile",
        "amx_bf16": "amx-bf16", "amx_int8": "amx-int8",
    },
    "aarch64": {
        "asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
    },
}  # fmt: skip
_SAME = {"amd64": "x86_64", "arm64": "aarch64"}


def architecture(name: str) -> str:
    """One name for each architecture: ``arm64`` is ``aarch64``."""
    return _SAME.get(name.lower(), name.lower())


def of_processor(mcpu: str, triple: str = "", attributes: Sequence[str] = ()) -> frozenset[str]:
    """LLVM's attributes of a processor, with ``+x`` and ``-x`` of `attributes` applied.

    Raises `OptionError` for a processor that LLVM does not have for this architecture.
    """
    import tvm
    from tvm.target import codegen

    described: dict[str, Any] = {"kind": "llvm"} | ({"mtriple": triple} if triple else {})
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target(described))]
    if mcpu not in known:
        near = difflib.get_close_matches(mcpu, known, 3) or ["generic"]
        raise OptionError(f"LLVM has no processor {mcpu!r} for {triple or 'this machine'}", f"Near: {', '.join(near)}")
    found = {str(name) for name in codegen.llvm_get_cpu_features(tvm.target.Target({**described, "mcpu": mcpu}))}
    for attribute in attributes:
        if attribute[:1] not in ("+", "-") or len(attribute) < 2:
            raise OptionError(f"cannot read attribute {attribute!r}", "Write it like -mattr=+neon,-sve")
        (found.add if attribute[0] == "+" else found.discard)(attribute[1:])
    return frozenset(found)


def flags_of(arch: str, attributes: frozenset[str]) -> tuple[str, ...]:
    """Linux's names of those of LLVM's attributes that matter here."""
    return tuple(flag for flag, name in FEATURES.get(arch, {}).items() if name in attributes)


def vector_floats(arch: str, features: Sequence[str]) -> int:
    """fp32 numbers in one register."""
    if arch != "x86_64":
        return 4
    return 16 if "avx512f" in features else 8 if "avx2" in features else 4


def registers(arch: str, features: Sequence[str]) -> int:
    """How many vector registers there are."""
    return 16 if arch == "x86_64" and "avx512f" not in features else 32
