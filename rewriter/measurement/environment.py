"""The state of the machine that a measurement was taken on, as text for reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from rewriter.runtimes.workers import pinnable

__all__ = ["describe", "pinnable", "processor"]

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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
