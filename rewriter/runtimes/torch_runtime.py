"""Torch as a runtime: the graph as a program of its calls, run as it is or compiled ahead of time by TorchInductor.

Programs have fixed shapes. The one for the shapes given to `build` is made there; others are made when feeds of their
shapes come, and kept beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from rewriter.core.errors import DataError, ModelError
from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph, TensorSpec, load
from rewriter.graph.ranges import integer_ranges
from rewriter.graph.tensors import to_numpy, to_torch
from rewriter.runtimes.base import Feeds
from rewriter.runtimes.torch_trace import trace

Shapes = Mapping[str, tuple[int, ...]]
Program = Callable[..., Sequence[Tensor]]
Key = tuple[tuple[int, ...], ...]

_ABOUT, _GRAPH, _PROGRAM = "torch.json", "graph.onnx", "model.pt2"


class TorchEager:
    """Torch as people call it: one call after the other, attention by `scaled_dot_product_attention`.

    The artifact is a folder with the graph and, for the shapes given to `build`, an exported program (``model.pt2``)
    that `torch.export.load` reads without us.
    """

    name: str = "torch-eager"

    def available(self) -> Refusal | None:
        """Torch is always here: we need it ourselves."""
        return None

    def build(self, graph: OnnxGraph, shapes: Shapes, folder: Path, target: Target) -> Path:
        """Write the artifact folder; without `shapes` every program is made when its shapes first come."""
        folder.mkdir(parents=True, exist_ok=True)
        graph.save(folder / _GRAPH)
        about: dict[str, Any] = {"format": 1, "shapes": None, "threads": target.threads}
        if shapes:
            key = tuple(tuple(shapes[spec.name]) for spec in graph.inputs)
            about["shapes"] = [list(shape) for shape in key]
            self.write(graph, key, folder / _PROGRAM, target.threads)
        (folder / _ABOUT).write_text(json.dumps(about))
        return folder

    def load(self, artifact: Path, threads: int) -> TorchExecutable:
        """The programs of an artifact, on `threads` threads, which torch holds for the whole process."""
        torch.set_num_threads(threads)
        return TorchExecutable(artifact, threads, self)

    def write(self, graph: OnnxGraph, key: Key, place: Path, threads: int) -> None:
        """Write the program for these input shapes, in the order of the inputs."""
        program, arguments = traced(graph, key)
        with _exporting():
            torch.export.save(torch.export.export(program, arguments, strict=False), place)

    def read(self, place: Path) -> Program:
        """The inverse of `write`."""
        with _exporting():
            module: Program = torch.export.load(place).module()
        return module


class TorchCompile(TorchEager):
    """TorchInductor: the same program compiled ahead of time to C++ for this processor, weights frozen (AOTInductor).

    ``model.pt2`` is what `torch._inductor.aoti_load_package` reads. Compared with `torch.compile` on the module, which
    compiles the same program in every process that runs it, nothing of Python is left between kernels.
    """

    name = "torch-compile"
    _compilers: ClassVar[tuple[str, ...]] = ("g++", "clang++")

    def __init__(self) -> None:
        self.cache: Path | None = None

    def available(self) -> Refusal | None:
        """Whether there is a C++ compiler."""
        if not any(map(shutil.which, self._compilers)):
            return Refusal("no-compiler", "TorchInductor needs a C++ compiler; install g++")
        return None

    def write(self, graph: OnnxGraph, key: Key, place: Path, threads: int) -> None:
        """Compile; the number of threads is part of the code."""
        from rewriter.runtimes.torch_inductor import compile_package

        program, arguments = traced(graph, key)
        folder = place.parent / "inductor" if self.cache is None else self.cache / "inductor"
        with _exporting():
            exported = torch.export.export(program, arguments, strict=False)
        compile_package(exported, place, folder, threads)

    def read(self, place: Path) -> Program:
        """Load the compiled package."""
        package: Program = torch._inductor.aoti_load_package(str(place))
        return package


class TorchExecutable:
    """Programs of one graph by the shapes of its inputs."""

    def __init__(self, artifact: Path, threads: int, runtime: TorchEager) -> None:
        self._folder, self._threads, self._runtime = artifact, threads, runtime
        try:
            about = json.loads((artifact / _ABOUT).read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{artifact} is no torch artifact: {error}", "Build it again") from error
        self._graph = load(artifact / _GRAPH)
        self._programs: dict[Key, Program] = {}
        # Compiled code has its number of threads in it.
        if about["shapes"] is not None and about["threads"] == threads:
            key = tuple(tuple(shape) for shape in about["shapes"])
            self._programs[key] = runtime.read(artifact / _PROGRAM)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `DataError` when inputs are missing or do not fit."""
        tensors = self._tensors(feeds)
        program = self._program(tensors)
        with torch.inference_mode():
            results = program(*tensors)
        return {spec.name: to_numpy(r) for spec, r in zip(self._graph.outputs, results, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """A run on tensors that are there already; torch makes its outputs anew in every run."""
        tensors = self._tensors(feeds)
        program = self._program(tensors)

        def once() -> None:
            with torch.inference_mode():
                program(*tensors)

        return once

    def _program(self, tensors: Sequence[Tensor]) -> Program:
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._programs:
            name = "_".join("x".join(map(str, shape)) or "scalar" for shape in key)
            place = self._folder / f"{name}-{self._threads}.pt2"
            if not place.exists():
                self._runtime.write(self._graph, key, place, self._threads)
            self._programs[key] = self._runtime.read(place)
        return self._programs[key]

    def _tensors(self, feeds: Feeds) -> list[Tensor]:
        return [_tensor(spec, feeds) for spec in self._graph.inputs]


def traced(graph: OnnxGraph, key: Key) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The program for these shapes, and arguments of them. What the arguments hold does not matter."""
    ranges = integer_ranges(graph)
    feeds = {
        spec.name: np.full(shape, ranges.get(spec.name, (1, 0))[0]).astype(spec.dtype)
        for spec, shape in zip(graph.inputs, key, strict=True)
    }
    arguments = tuple(to_torch(feeds[spec.name]) for spec in graph.inputs)
    return trace(graph, feeds), arguments


def _tensor(spec: TensorSpec, feeds: Feeds) -> Tensor:
    if spec.name not in feeds:
        raise DataError(f"no values for input {spec.name!r}", f"Give {spec}")
    array = np.asarray(feeds[spec.name])
    fixed = len(array.shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == size for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if array.dtype != spec.dtype or not fixed:
        raise DataError(f"input {spec.name!r} is {array.dtype} {list(array.shape)}", f"Give {spec}")
    return to_torch(np.ascontiguousarray(array))


@contextmanager
def _exporting() -> Iterator[None]:
    """What torch's exporter raises, as our error."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"torch cannot export the program: {first}", "Use another runtime") from error
