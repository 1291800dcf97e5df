"""Where the time of a compiled model goes: the virtual machine calls back before and after every kernel."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from rewriter.runtimes.tvm.load import TvmExecutable

GO_ON = 0  # anything else makes the virtual machine skip the call


def profile(executable: TvmExecutable, feeds: Mapping[str, NDArray[Any]], runs: int = 10) -> dict[str, float]:
    """Seconds per run of every kernel and builtin, the largest first; the callback itself costs about 1 us per call."""
    spent: dict[str, float] = defaultdict(float)
    begun: list[float] = []

    def watch(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
        now = time.perf_counter()
        if before:
            begun.append(now)
        else:
            spent[str(name)] += now - begun.pop()
        return GO_ON

    once = executable.bind(feeds)
    once()
    executable.machine().set_instrument(watch)
    try:
        for _ in range(runs):
            once()
    finally:
        executable.forget_machine()
    return {name: seconds / runs for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}
