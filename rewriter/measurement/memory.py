"""Peak resident memory of a worker."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from rewriter.runtimes.workers import Worker, WorkerFailure

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_resident_bytes(worker: Worker) -> int | WorkerFailure:
    """The most memory the worker's process has held since its start, or since `forget_peak`."""
    result: int | WorkerFailure = worker.call("rewriter.measurement.memory:own_peak_bytes")
    return result


def forget_peak(worker: Worker) -> bool | WorkerFailure:
    """Count the peak from now on; False where the system cannot."""
    result: bool | WorkerFailure = worker.call("rewriter.measurement.memory:forget_own_peak")
    return result


def own_peak_bytes() -> int:
    """Peak of this process. On Linux not ``ru_maxrss``: a child inherits that from the process that started it."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_own_peak() -> bool:
    """Set this process's peak to what it holds now, which Linux allows."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
