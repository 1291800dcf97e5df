"""Runs artifacts. Imports nothing but TVM and numpy: an application needs no part of the optimizer."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from rewriter.core.errors import DataError, ModelError
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.artifact import CODE, WEIGHTS, read_manifest

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


class TvmExecutable:
    """A loaded artifact; `run` may be called from several threads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.inputs: list[dict[str, Any]] = manifest["inputs"]
        self._order = [spec["name"] for spec in self.inputs]
        self.output_names = [output["name"] for output in manifest["outputs"]]
        self.buckets: list[dict[str, Any]] = sorted(manifest["buckets"], key=_volume)
        self._weights: dict[str, Any] = {}
        self._local = threading.local()
        self._open()

    def _open(self) -> None:
        """Load code and weights to where they run."""
        self._module = tvm.runtime.load_module(str(self.folder / CODE))
        self._weights = read_weights(self.folder / WEIGHTS)

    # ---- one run

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name. Inputs shorter than a bucket are padded and outputs cropped if the artifact allows it.

        Raises `DataError` when inputs are missing or fit no bucket.
        """
        arrays = self._checked(feeds)
        bucket = self._bucket(arrays)
        tensors = [tvm.runtime.tensor(self._padded(name, arrays[name], bucket)) for name in self._order]
        results = self._function(bucket)(*tensors, *self._parameters(bucket))
        outputs = [result.numpy() for result in results]
        sizes = self._sizes(arrays, bucket)
        return {
            name: self._cropped(output, described, sizes)
            for name, output, described in zip(self.output_names, outputs, self.manifest["outputs"], strict=True)
        }

    def bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """One run on these inputs as often as it is called: nothing is checked, converted or copied inside."""
        arrays = self._checked(feeds)
        bucket = self._bucket(arrays)
        tensors = [tvm.runtime.tensor(self._padded(name, arrays[name], bucket)) for name in self._order]
        function, arguments = self._function(bucket), (*tensors, *self._parameters(bucket))

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
        self._local.__dict__.pop("machine", None)

    # ---- buckets

    def _checked(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        unknown = sorted(set(feeds) - {spec["name"] for spec in self.inputs})
        if unknown:
            raise DataError(f"the model has no input {unknown[0]!r}", f"Its inputs are {self._input_names()}")
        arrays = {}
        for spec in self.inputs:
            if spec["name"] not in feeds:
                raise DataError(f"the model's input {spec['name']!r} is missing", f"Give {self._input_names()}")
            arrays[spec["name"]] = np.ascontiguousarray(feeds[spec["name"]], dtype=np.dtype(spec["dtype"]))
        return arrays

    def _input_names(self) -> str:
        return ", ".join(spec["name"] for spec in self.inputs)

    def _bucket(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """The smallest bucket that holds these inputs."""
        for bucket in self.buckets:
            if all(self._holds(name, arrays[name].shape, tuple(shape)) for name, shape in bucket["inputs"].items()):
                return bucket
        given = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in arrays.items())
        largest = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.buckets[-1]["inputs"].items())
        raise DataError(
            f"inputs {given} fit no shape that was built; the largest is {largest}", "Build with their shape"
        )

    def _holds(self, name: str, given: tuple[int, ...], built: tuple[int, ...]) -> bool:
        if given == built:
            return True
        fits = len(given) == len(built) and all(g <= b for g, b in zip(given, built, strict=True))
        return fits and name in self.manifest["pad"]

    def _padded(self, name: str, array: NDArray[Any], bucket: Mapping[str, Any]) -> NDArray[Any]:
        shape = tuple(bucket["inputs"][name])
        if array.shape == shape:
            return array
        padded = np.full(shape, self.manifest["pad"][name], array.dtype)
        padded[tuple(slice(0, size) for size in array.shape)] = array
        return padded

    def _sizes(self, arrays: Mapping[str, NDArray[Any]], bucket: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """(real, built) size of every named axis."""
        sizes = {}
        for spec in self.inputs:
            name = spec["name"]
            for axis, label in enumerate(spec["shape"]):
                if isinstance(label, str):
                    sizes[label] = (arrays[name].shape[axis], bucket["inputs"][name][axis])
        return sizes

    def _cropped(
        self, output: NDArray[Any], described: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]
    ) -> NDArray[Any]:
        window = []
        for axis, label in enumerate(described["shape"]):
            real, built = sizes.get(label, (output.shape[axis],) * 2) if isinstance(label, str) else (None, None)
            window.append(slice(0, real) if real != built else slice(None))
        return output[tuple(window)] if any(part.stop is not None for part in window) else output

    def _function(self, bucket: Mapping[str, Any]) -> Any:
        return self.machine()[bucket["function"]]

    def _parameters(self, bucket: Mapping[str, Any]) -> list[Any]:
        return [self._weights[name] for name in bucket["parameters"]]


def _volume(bucket: Mapping[str, Any]) -> int:
    return sum(int(np.prod(shape)) for shape in bucket["inputs"].values())


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
