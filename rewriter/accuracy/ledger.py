"""How often a certification split was opened. Each further look, for another model or candidate, costs confidence.

A verdict tells one bit about the split. Whoever acts on k such bits can end at any of 2^k candidates, so the k+1st look
tests at delta / 2^k: by the union bound a bad candidate still passes with probability at most delta.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MOST_OPENINGS = 8


@dataclass(frozen=True)
class Opening:
    """What one look at a certification split may claim. `ordinal` counts distinct subjects from 1.

    `confidence` is what is left for this look, 0 if the split is used up.
    """

    ordinal: int
    confidence: float
    sentence: str

    @property
    def refused(self) -> bool:
        """Whether the split has been looked at too often to certify anything."""
        return self.confidence <= 0.0


class Ledger:
    """One append-only file per data hash, locked while it is read and written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, data_hash: str, subject: str, confidence: float = 0.95) -> Opening:
        """Record a look at the split `data_hash` by `subject` (a fingerprint of model and candidate).

        The same subject looking again learns nothing new and pays nothing. A line that a killed process left
        unfinished counts as a look by somebody else.
        """
        with self._locked(data_hash) as file:
            subjects = _subjects(file.read())
            if subject not in subjects:
                file.write(json.dumps({"subject": subject}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                subjects.append(subject)
        return _opening(subjects.index(subject) + 1, confidence)

    def foresee(self, data_hash: str, subject: str, confidence: float = 0.95) -> Opening:
        """What `open` would say, without opening."""
        path = self._path(data_hash)
        subjects = _subjects(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
        ordinal = subjects.index(subject) if subject in subjects else len(subjects)
        return _opening(ordinal + 1, confidence)

    def _path(self, data_hash: str) -> Path:
        return self.folder / f"{data_hash}.jsonl"

    @contextmanager
    def _locked(self, data_hash: str) -> Iterator[IO[str]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path(data_hash).open("a+", encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if text and not text.endswith("\n"):
                file.write("\n")
                file.flush()
            file.seek(0)
            yield file


def _subjects(text: str) -> list[str]:
    """Distinct subjects in order; a torn line is a subject of its own."""
    found: list[str] = []
    for number, line in enumerate(text.splitlines()):
        try:
            subject = str(json.loads(line)["subject"])
        except (ValueError, KeyError, TypeError):
            subject = f"unreadable line {number}"
        if subject not in found:
            found.append(subject)
    return found


def _opening(ordinal: int, confidence: float) -> Opening:
    delta = (1.0 - confidence) / 2.0 ** (ordinal - 1)
    if ordinal > MOST_OPENINGS:
        return Opening(
            ordinal,
            0.0,
            f"this data was used to certify {ordinal - 1} candidates before: it certifies nothing any more",
        )
    if ordinal == 1:
        return Opening(1, confidence, "the certification split is opened for the first time")
    times = "once" if ordinal == 2 else f"{ordinal - 1} times"
    return Opening(
        ordinal,
        1.0 - delta,
        f"the certification split was opened {times} before: this look is tested at {1.0 - delta:.4%} "
        f"so that {confidence:.0%} confidence still holds",
    )
