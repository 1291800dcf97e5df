"""Results by key in one append-only file of JSON lines that survives being killed, shared, cut off and upgraded.

Appending is under a file lock and on disk before it returns; a reader takes what was appended since it last looked. A
line that is damaged, or that another version of this program wrote, is passed over and counted, never guessed at.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewriter.core.errors import OutputError

FORMAT = 1
_logger = logging.getLogger("rewriter")


class Store:
    """Values by key; the last entry of a key counts. Keys and values are objects of plain JSON types."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self.foreign = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._read_bytes = 0

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What this process or another stored under a key, or None."""
        self._refresh()
        return self._entries.get(_text(key))

    def put(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Append one entry. Raises `OutputError` when the file cannot be written; what was there before stays."""
        entry = {"format": FORMAT, "key": json.loads(_text(key)), "value": dict(value)}
        line = (json.dumps(entry, sort_keys=True) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error}", "Make room, or choose another --cache-dir"
            ) from error
        self._entries[_text(key)] = dict(value)

    def items(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Every key with its value."""
        self._refresh()
        for text, value in self._entries.items():
            yield json.loads(text), value

    def note(self) -> str:
        """What of the file was not used, as a sentence; empty when all of it was."""
        self._refresh()
        parts = [
            f"{count} {reason}"
            for count, reason in ((self.damaged, "damaged or cut off"), (self.foreign, "written by another version"))
            if count
        ]
        return f"{self.path}: lines were ignored and are measured again: {', '.join(parts)}" if parts else ""

    def _refresh(self) -> None:
        """Read what was appended since last time; from the beginning if the file was replaced by a shorter one."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return
        if size < self._read_bytes:
            self._read_bytes, self._entries, self.damaged, self.foreign = 0, {}, 0, 0
        if size == self._read_bytes:
            return
        unused = self.damaged + self.foreign
        with self.path.open("rb") as file:
            # No writer is half-way through a line while this lock is held: a torn end is that of a killed one.
            fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(self._read_bytes)
            fresh = file.read()
        self._read_bytes += len(fresh)
        for line in fresh.split(b"\n"):
            if line:
                self._take(line)
        if self.damaged + self.foreign > unused:
            _logger.info("%s", self.note())

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("format") != FORMAT:
                self.foreign += 1
                return
            self._entries[_text(entry["key"])] = dict(entry["value"])
        except (ValueError, TypeError, KeyError):
            self.damaged += 1


def _append(path: Path, line: bytes) -> None:
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
            # A writer that was killed, or found the disk full, may have left half a line: start a new one.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _text(key: Mapping[str, Any]) -> str:
    if not isinstance(key, Mapping):
        raise TypeError("a key is an object")
    return json.dumps(key, sort_keys=True)
