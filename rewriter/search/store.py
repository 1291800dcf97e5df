"""A key-value file that survives being killed and being shared: one JSON object per line, appended under a lock."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Store:
    """Results by key in one append-only file. A torn or foreign line is passed over; the last entry of a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] | None = None

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The value stored under this key, or None."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.get(_text(key))

    def put(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Append one entry; on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps({"key": json.loads(_text(key)), "value": dict(value)}, sort_keys=True) + "\n").encode()
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                # A writer that was killed may have left half a line: start a new one.
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if self._entries is not None:
            self._entries[_text(key)] = dict(value)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        entries: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                entries[_text(entry["key"])] = dict(entry["value"])
            except (ValueError, TypeError, KeyError):
                continue
        return entries


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
