"""The state of the machine that a measurement was taken on, as text for reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi", "openvino")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe(threads: int, cores: Sequence[int] = ()) -> dict[str, str]:
    """Processor, cores, load, frequency governor where readable, memory, and versions of what computes."""
    found = {
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "logical_cores": str(psutil.cpu_count() or 0),
        "physical_cores": str(psutil.cpu_count(logical=False) or 0),
        "threads": str(threads),
        "pinned_to_cores": ",".join(map(str, cores)) or "none",
        "load_1_minute": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else "unknown",
        "memory_bytes": str(psutil.virtual_memory().total),
    }
    return found | {f"version {name}": version for name in _PACKAGES if (version := _version(name))}


def processor() -> str:
    """The processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Processor"):
                return value.strip()
    return platform.processor() or platform.machine()


def pinnable(threads: int) -> tuple[int, ...]:
    """A core per thread out of those this process may use, the last ones, as interrupts gather on the first.

    Empty where the system cannot pin, or has fewer cores than threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed[-threads:]) if 0 < threads <= len(allowed) else ()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
