"""Weights outside the code: an ordered set of arrays keyed by content, written as safetensors and mapped on load.

Code that does not contain weights depends on the structure alone, so a variant with other weights compiles nothing.
The file is ordinary safetensors; its header is padded so that the arrays begin at multiples of 64 bytes, which lets
kernels read them where they are mapped.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
_NAMES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip


def content_key(array: NDArray[Any]) -> str:
    """A name made of the content."""
    digest = hashlib.sha256(repr((array.shape, str(array.dtype))).encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()[:32]


class Parameters:
    """Arrays by content; equal arrays are kept once."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self._keys: dict[int, tuple[NDArray[Any], str]] = {}
        self._derived: dict[Hashable, str] = {}

    def add(self, array: NDArray[Any]) -> str:
        """The name of an array, which is kept."""
        key = self.key(array)
        self._arrays.setdefault(key, np.ascontiguousarray(array))
        return key

    def key(self, array: NDArray[Any]) -> str:
        """The name that an array has, whether it is kept or not."""
        known = self._keys.get(id(array))
        if known is not None and known[0] is array:
            return known[1]
        key = content_key(array)
        self._keys[id(array)] = (array, key)
        return key

    def derived(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> tuple[str, NDArray[Any]]:
        """(name, array) of something computed once per `key`."""
        if key not in self._derived:
            self._derived[key] = self.add(make())
        name = self._derived[key]
        return name, self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __getitem__(self, key: str) -> NDArray[Any]:
        return self._arrays[key]

    def __len__(self) -> int:
        return len(self._arrays)


def write_parameters(parameters: Parameters, path: Path) -> str:
    """Write all arrays; returns the file's sha256. Arrays whose size is no multiple of 64 bytes come last."""
    order = sorted(parameters, key=lambda key: (parameters[key].nbytes % ALIGNMENT != 0, key))
    header: dict[str, Any] = {}
    offset = 0
    for key in order:
        array = parameters[key]
        span = [offset, offset + array.nbytes]
        header[key] = {"dtype": _NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        arrays: list[Any] = [parameters[key].reshape(-1).view(np.uint8) for key in order if parameters[key].size]
        for piece in (struct.pack("<Q", len(text)), text, *arrays):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
