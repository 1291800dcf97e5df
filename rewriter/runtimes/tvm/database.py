"""What was measured about kernels, kept for next time: by kernel, shape, dtype, target and TVM."""

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
    """What a record is about: a kernel with its epilogue, a shape, a dtype, on one target with one TVM."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    target: str
    tvm: str

    @classmethod
    def of(cls, kernel: str, shape: Sequence[int], target: Target, dtype: str = "float32") -> Subject:
        """The subject on this target with the TVM that is installed."""
        digest = hashlib.sha256(json.dumps(target.key(), sort_keys=True).encode()).hexdigest()[:16]
        return cls(kernel, tuple(shape), dtype, digest, versions()["apache-tvm"])

    def as_dict(self) -> dict[str, Any]:
        """The key in the file."""
        return {
            "kernel": self.kernel,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "target": self.target,
            "tvm": self.tvm,
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
