"""What was measured about kernels, kept for next time: a file of one JSON record per line, only ever appended to.

Two processes may use it at once (appending is under a file lock), and a line that a killed process left unfinished
is skipped and does not spoil the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.core.errors import OutputError
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
        """For the file."""
        return {
            "kernel": self.kernel,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "target": self.target,
            "tvm": self.tvm,
        }


class TuningDatabase:
    """Records by subject; the last one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[Subject, dict[str, Any]] = {}
        self._read_bytes = 0

    def find(self, subject: Subject) -> dict[str, Any] | None:
        """The result recorded for a subject, by this process or another, or None."""
        self._refresh()
        return self._records.get(subject)

    def add(self, subject: Subject, result: Mapping[str, Any]) -> None:
        """Record a result. Raises `OutputError` when the file cannot be written."""
        line = json.dumps({**subject.as_dict(), "result": dict(result)}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, 2)
                torn = end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n"
                file.write((b"\n" if torn else b"") + line.encode())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error}", "Choose another --cache-dir") from error
        self._records[subject] = dict(result)

    def _refresh(self) -> None:
        """Read what was appended since last time, up to the last whole line."""
        if not self.path.exists() or self.path.stat().st_size <= self._read_bytes:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            names = (str(record[key]) for key in ("dtype", "target", "tvm"))
            subject = Subject(str(record["kernel"]), tuple(record["shape"]), *names)
            self._records[subject] = dict(record["result"])
        except (ValueError, KeyError, TypeError):
            return  # a line cut off by a kill, or written by another version: the kernel is measured again
