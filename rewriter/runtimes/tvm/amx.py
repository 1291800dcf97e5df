"""Permission to use the tile registers of AMX, which Linux grants to each process that asks.

Threads share it and children made by fork inherit it; a program that is started anew asks for itself. Without it the
first tile instruction ends the process. See Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache

from rewriter.core.errors import ModelError
from rewriter.core.target import Target

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
PREFIX = "amx_"


@cache
def permitted() -> bool:
    """Ask Linux once; False where the processor, the kernel or a virtual machine has no tile registers to give."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def among(features: Sequence[str]) -> bool:
    """Whether any of these flags belongs to the matrix unit."""
    return any(feature.startswith(PREFIX) for feature in features)


def without(features: Sequence[str]) -> tuple[str, ...]:
    """The flags that do not belong to the matrix unit."""
    return tuple(feature for feature in features if not feature.startswith(PREFIX))


def ask_for(target: Target) -> None:
    """Ask before code for `target` runs in this process, if it may use tiles. Raises `ModelError` when refused."""
    if not target.elsewhere and among(target.features):
        demand("code of the matrix unit")


def demand(what: str) -> None:
    """Ask for permission. Raises `ModelError` that says what cannot run without it."""
    if not permitted():
        hint = "Build it again on this machine: it then does without"
        raise ModelError(f"{what} was built for AMX, which this processor or its kernel does not permit", hint)
