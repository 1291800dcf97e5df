"""What was measured about kernels, kept for next time: by kernel, shape, dtype, target, TVM and the kernel's source.

Three kinds of entries share one file: what was chosen for a subject, what a choice took against the default, and why a
choice failed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.core.store import Store
from rewriter.core.target import Target
from rewriter.runtimes.tvm.artifact import versions


@dataclass(frozen=True)
class Subject:
    """What a record is about: a kernel with its epilogue, a shape, a dtype, on one target with one TVM.

    The threads are part of the target. `source` is a version of the kernel's template: a changed one is measured anew.
    """

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    target: str
    tvm: str
    source: str = ""

    @classmethod
    def of(cls, kernel: str, shape: Sequence[int], target: Target, dtype: str = "float32", source: str = "") -> Subject:
        """The subject on this target with the TVM that is installed."""
        digest = hashlib.sha256(json.dumps(target.key(), sort_keys=True).encode()).hexdigest()[:16]
        return cls(kernel, tuple(shape), dtype, digest, versions()["apache-tvm"], source)

    def as_dict(self) -> dict[str, Any]:
        """The key in the file."""
        return {
            "kernel": self.kernel,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "target": self.target,
            "tvm": self.tvm,
            "source": self.source,
        }


class TuningDatabase:
    """Records by subject; the last one counts. Several processes may use one file; see `rewriter.core.store`."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path)

    def find(self, subject: Subject) -> dict[str, Any] | None:
        """The result recorded for a subject, by this process or another, or None."""
        return self.store.get(subject.as_dict())

    def add(self, subject: Subject, result: Mapping[str, Any]) -> None:
        """Record a result. Raises `OutputError` when the file cannot be written."""
        self.store.put(subject.as_dict(), result)

    def add_failure(self, subject: Subject, choice: str, reason: str) -> None:
        """Record that a choice crashed, hung or computed something else; it is never tried again."""
        self.store.put({**subject.as_dict(), "choice": choice}, {"failed": reason or "unknown"})

    def failure(self, subject: Subject, choice: str) -> str:
        """Why a choice failed; empty for one that did not, or was never tried."""
        found = self.store.get({**subject.as_dict(), "choice": choice})
        return str(found.get("failed", "")) if found else ""

    def add_measured(self, subject: Subject, choice: str, ratio: float) -> None:
        """Record what a choice took against the default, before the subject is done."""
        self.store.put({**subject.as_dict(), "choice": choice}, {"ratio": ratio})

    def measured(self, subject: Subject, choice: str) -> float:
        """What a choice took against the default; 1 for one that was never measured."""
        found = self.store.get({**subject.as_dict(), "choice": choice})
        return float(found.get("ratio", 1.0)) if found else 1.0
