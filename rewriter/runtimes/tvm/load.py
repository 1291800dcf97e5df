"""Runs artifacts. Imports nothing but TVM and numpy: an application needs no part of the optimizer."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from rewriter.core.errors import DataError, ModelError
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.artifact import CODE, WEIGHTS, read_manifest
from rewriter.runtimes.tvm.buckets import Buckets, Window, filled

ALIGNMENT = 64
_DTYPES = {
    "F32": "float32", "F64": "float64", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
_threads: dict[str, int] = {}


def load(folder: Path | str, threads: int | None = None) -> TvmExecutable:
    """Load an artifact. `threads` must be what it was built for, which is the default.

    Asks the system for the tile registers of AMX where the artifact needs them. Raises `ModelError` when the folder is
    incomplete, altered, or made for another processor or TVM.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    built = int(manifest["threads"])
    if threads is not None and threads != built:
        raise ModelError(f"{place} was built for {built} threads, not {threads}", f"Build it with --threads {threads}")
    if amx.among(manifest["requires"]):
        amx.demand(str(place))
    _use_threads(built)
    return TvmExecutable(place, manifest)


def _use_threads(count: int) -> None:
    """Size TVM's thread pool, which is one per process; code without parallel loops never touches it."""
    if count > 1 and _threads.get("pool") != count:
        tvm.get_global_func("runtime.config_threadpool")(1, count)
        _threads["pool"] = count


class _Call:
    """One bucket as one thread calls it: inputs have their place, which every request is written into."""

    def __init__(self, function: Any, tensors: Sequence[Any], parameters: Sequence[Any]) -> None:
        self.function, self.tensors, self.arguments = function, tensors, (*tensors, *parameters)
        self.views = [_view(tensor) for tensor in tensors]

    def put(self, index: int, array: NDArray[Any], window: Window | None, pad: float) -> None:
        """Write an input to its place; outside of its window there is padding."""
        view = self.views[index]
        if view is None:
            self.tensors[index].copyfrom(filled(array, self.tensors[index].shape, window, pad))
        elif window is None:
            view[...] = array
        else:
            view.fill(pad)
            view[window] = array


def _view(tensor: Any) -> NDArray[Any] | None:
    """A tensor's memory as an array; None for types that numpy cannot share (bfloat16)."""
    try:
        return np.from_dlpack(tensor)
    except (RuntimeError, BufferError):
        return None


class TvmExecutable:
    """A loaded artifact; `run` may be called from several threads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._sizes = Buckets(manifest)
        self.inputs, self.buckets = self._sizes.inputs, self._sizes.all
        self._order = [spec["name"] for spec in self.inputs]
        self._dtypes = {spec["name"]: np.dtype(spec["dtype"]) for spec in self.inputs}
        self.output_names = [output["name"] for output in manifest["outputs"]]
        self._weights: dict[str, Any] = {}
        self._local = threading.local()
        self._open()

    def _open(self) -> None:
        """Load code and weights to where they run."""
        self._module = tvm.runtime.load_module(str(self.folder / CODE))
        self._weights = read_weights(self.folder / WEIGHTS)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name. Inputs shorter than a bucket are padded and outputs cropped if the artifact allows it.

        Raises `DataError` when inputs are missing or fit no bucket.
        """
        arrays = self._checked(feeds)
        fit = self._sizes.fit(arrays)
        call = self._call(fit.bucket)
        for index, name in enumerate(self._order):
            call.put(index, arrays[name], fit.windows[name], self._sizes.pad.get(name, 0.0))
        results = call.function(*call.arguments)
        return {
            name: result.numpy() if crop is None else result.numpy()[crop]
            for name, result, crop in zip(self.output_names, results, fit.crops, strict=True)
        }

    def bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """One run on these inputs as often as it is called: nothing is checked, converted or copied inside."""
        arrays = self._checked(feeds)
        fit = self._sizes.fit(arrays)
        tensors = [tvm.runtime.tensor(self._sizes.padded(name, arrays[name], fit)) for name in self._order]
        function, arguments = self._function(fit.bucket), (*tensors, *self._parameters(fit.bucket))

        def once() -> None:
            function(*arguments)

        return once

    def machine(self) -> Any:
        """The virtual machine of the calling thread."""
        if not hasattr(self._local, "machine"):
            self._local.machine = relax.VirtualMachine(self._module, tvm.cpu())
        return self._local.machine

    def forget_machine(self) -> None:
        """The calling thread gets a new virtual machine on its next run, without any instrument."""
        self._local.__dict__.clear()

    def _call(self, bucket: Mapping[str, Any]) -> _Call:
        """The calling thread's own: a virtual machine and inputs serve one call at a time."""
        calls: dict[str, _Call] = self._local.__dict__.setdefault("calls", {})
        found = calls.get(bucket["function"])
        if found is None:
            shapes = [(tuple(bucket["inputs"][name]), str(self._dtypes[name])) for name in self._order]
            tensors = [tvm.runtime.empty(shape, dtype) for shape, dtype in shapes]
            found = calls[bucket["function"]] = _Call(self._function(bucket), tensors, self._parameters(bucket))
        return found

    def _checked(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        unknown = sorted(feeds.keys() - self._dtypes.keys())
        if unknown:
            raise DataError(f"the model has no input {unknown[0]!r}", f"Its inputs are {self._input_names()}")
        for name in self._order:
            if name not in feeds:
                raise DataError(f"the model's input {name!r} is missing", f"Give {self._input_names()}")
        return {name: np.ascontiguousarray(feeds[name], dtype=dtype) for name, dtype in self._dtypes.items()}

    def _input_names(self) -> str:
        return ", ".join(self._order)

    def _function(self, bucket: Mapping[str, Any]) -> Any:
        return self.machine()[bucket["function"]]

    def _parameters(self, bucket: Mapping[str, Any]) -> list[Any]:
        return [self._weights[name] for name in bucket["parameters"]]


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors by name, mapped where their place in the file allows it. Raises `ModelError` for a malformed file."""
    try:
        mapped = np.memmap(path, np.uint8, mode="c")
        (length,) = struct.unpack("<Q", mapped[:8].tobytes())
        header = json.loads(mapped[8 : 8 + length].tobytes())
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path} cannot be read: {error}", "Build the model again") from error
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = mapped[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        # Kernels assume this alignment; the few small arrays that miss it are copied.
        aligned = array.ctypes.data % ALIGNMENT == 0 and array.size > 0 and array.dtype != np.bool_
        tensors[name] = tvm.runtime.from_dlpack(np.asarray(array)) if aligned else tvm.runtime.tensor(np.array(array))
    return tensors
