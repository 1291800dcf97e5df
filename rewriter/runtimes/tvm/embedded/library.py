"""Writes a static library: kernels as machine code, a C function around them, a header, weights and an example."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from rewriter.core.errors import OptionError, OutputError
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.compile import Module, function_name, lower
from rewriter.runtimes.tvm.embedded import code
from rewriter.runtimes.tvm.embedded.steps import Reader, Region, aligned, planned
from rewriter.runtimes.tvm.kernels.amx import required
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.tvm.tiles import Tiles
from rewriter.runtimes.tvm.toolchain import archiver, c_compiler, run

LIBRARY, HEADER, WEIGHTS, EXAMPLE = "libmodel.a", "model.h", "model.weights.bin", "example.c"
_PREFIX = "model_"
_FLAGS = ("-O2", "-std=c11", "-fPIC", "-Wall")


def write_library(
    graph: OnnxGraph,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    folder: Path,
    target: Target,
    tiles: Tiles | None = None,
) -> Path:
    """Write `LIBRARY`, `HEADER`, `WEIGHTS` and `EXAMPLE` to `folder`, one C function for each of `shapes`.

    The code runs on one thread. Raises `OptionError` without a C compiler for the target or for a GPU,
    `UnsupportedOperator` for what needs TVM's runtime, `OutputError` when the folder cannot be written.
    """
    if target.kind != "llvm" or target.threads != 1:
        raise OptionError("a static library is for one thread of a processor", "Use an llvm target and --threads 1")
    compiler = c_compiler(target)
    module = lower(graph, shapes, target, tiles)
    made = planned(module.functions, tvm_target(target))
    places, weights = _weights(module)
    constants: dict[bytes, Region] = {}
    entries = []
    for index, (program, arguments) in enumerate(zip(module.programs, module.arguments, strict=True)):
        reader = Reader([places[name] for name in arguments], constants)
        routine = reader.read(made[function_name(index)], len(program.inputs))
        names = code.identifiers([*program.inputs, *program.outputs])
        count = len(program.inputs)
        function = "model_run" if len(shapes) == 1 else f"model_run_{index}"
        entries.append(code.Entry(function, names[:count], names[count:], routine))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".library.", dir=folder) as work:
            _compile(Path(work), made, entries, constants, target, compiler, folder)
        (folder / WEIGHTS).write_bytes(weights)
        (folder / HEADER).write_text(code.header(entries, len(weights), f"target: {target.name}, {target.mcpu}"))
        (folder / EXAMPLE).write_text(code.example(entries[0]))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", "Make room or choose another folder") from error
    return folder


def build_library(model: Path, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
    """In a worker: the library of a saved graph at one set of shapes."""
    from rewriter.graph.onnx import load

    return write_library(load(model), [shapes], folder, target)


def _weights(module: Module) -> tuple[dict[str, Region], bytes]:
    """Where each parameter lies in the weights file, and the file."""
    places, content = {}, bytearray()
    for name in module.parameters:
        array = np.ascontiguousarray(module.parameters[name])
        places[name] = Region("weights", len(content), array.shape, str(array.dtype))
        content += array.tobytes() + bytes(aligned(array.nbytes) - array.nbytes)
    return places, bytes(content)


def _compile(
    work: Path,
    made: Any,
    entries: Sequence[code.Entry],
    constants: Mapping[bytes, Region],
    target: Target,
    compiler: Sequence[str],
    folder: Path,
) -> None:
    symbols = {
        variable.name_hint: f"__tvm_ffi_{_PREFIX}{variable.name_hint}"
        for variable, function in made.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }
    kernels = {name: made[name].with_attr("global_symbol", f"{_PREFIX}{name}") for name in symbols}
    built = tvm.tirx.build(tvm.IRModule(kernels), target=tvm_target(target))
    objects: list[Path] = []

    def keep(_output: str, paths: Sequence[str], **_: Any) -> None:
        for index, path in enumerate(paths):
            objects.append(work / f"kernels_{index}.o")
            shutil.copyfile(path, objects[-1])

    built.export_library(str(work / "unused.so"), fcompile=keep)
    (work / "model.h").write_text(code.header(entries, 0, ""))
    tiles = bool(required(kernels.values()))
    (work / "model.c").write_text(code.model(entries, symbols, _content(constants), tiles))
    for name in ("runtime.h", "runtime.c"):
        (work / name).write_text(files(__package__).joinpath(name).read_text())
    for name in ("model", "runtime"):
        run([*compiler, *_FLAGS, "-c", f"{name}.c", "-o", f"{name}.o"], cwd=work)
        objects.append(work / f"{name}.o")
    run([*archiver(target), "rcs", LIBRARY, *(path.name for path in objects)], cwd=work)
    (work / LIBRARY).replace(folder / LIBRARY)


def _content(constants: Mapping[bytes, Region]) -> bytes:
    """All constants, each at its offset."""
    content = bytearray()
    for key, region in constants.items():
        array = key[len(key) - region.nbytes :]
        content += bytes(region.offset - len(content)) + array
    return bytes(content)
