"""From a graph to an artifact: code for every shape bucket, weights beside it, and what is needed to run them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from rewriter.core.errors import OptionError, OutputError
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.standard import to_standard, with_some_written_out
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.artifact import CODE, CUBIN, FORMAT, MANIFEST, WEIGHTS, file_sha256, machine_of, versions
from rewriter.runtimes.tvm.caches import read_narrow
from rewriter.runtimes.tvm.fusion import fuse
from rewriter.runtimes.tvm.kernels.amx import required
from rewriter.runtimes.tvm.lowering import Kernels, Lowering
from rewriter.runtimes.tvm.objects import Objects, link
from rewriter.runtimes.tvm.operators import TABLE
from rewriter.runtimes.tvm.parameters import Parameters, write_parameters
from rewriter.runtimes.tvm.program import Program
from rewriter.runtimes.tvm.specialise import specialise
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.tvm.tiles import Tiles
from rewriter.runtimes.tvm.toolchain import compile_cuda, linker
from rewriter.runtimes.tvm.widening import widen

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Module:
    """What was lowered: an IRModule with one function per bucket, and the parameters they take."""

    functions: Any
    parameters: Parameters
    arguments: tuple[tuple[str, ...], ...]
    programs: tuple[Program, ...]
    work: Mapping[str, int]


def lower(graph: OnnxGraph, shapes: Sequence[Shapes], target: Target, tiles: Tiles | None = None) -> Module:
    """Lower `graph` for each of `shapes`. Raises `UnsupportedOperator` and `OptionError`."""
    if not shapes:
        raise OptionError("no input shapes to build for", "Give at least one")
    builder, parameters, chosen = relax.BlockBuilder(), Parameters(), tiles or Tiles(target)
    kernels, arguments, programs = Kernels(builder), [], []
    by_template = target.kind == "llvm"
    # Our templates are for processors; elsewhere composites are written out and left to TVM's schedules.
    written = with_some_written_out(graph, "tvm") if by_template else to_standard(graph)
    for index, bucket in enumerate(shapes):
        program = specialise(written, bucket)
        if by_template:
            widen(program)
            fuse(program)
            read_narrow(program, target.vector_floats)
        lowering = Lowering(program, target, kernels, parameters, chosen)
        arguments.append(lowering.lower(function_name(index), TABLE))
        programs.append(program)
    return Module(builder.get(), parameters, tuple(arguments), tuple(programs), kernels.work)


def function_name(bucket: int) -> str:
    """Of the function that serves a bucket."""
    return f"bucket_{bucket}"


def build(
    graph: OnnxGraph,
    shapes: Sequence[Shapes],
    folder: Path,
    target: Target,
    cache: Path | None = None,
    tiles: Tiles | None = None,
    pad: Mapping[str, float] | None = None,
    polish: Callable[[Any, Mapping[str, int]], Any] | None = None,
) -> Path:
    """Write an artifact for `graph` at each of `shapes` to `folder` and return it.

    `cache` keeps compiled kernels by content: a graph of known kernels compiles nothing, however it arranges them.
    `pad` gives for each input the value with which shorter axes may be filled up to a bucket; without it only exact
    shapes run. Whether padding is sound is for the caller to verify. `polish` may schedule the kernels that are no
    templates, which it is given beside the module. The folder appears whole or not at all. Raises
    `UnsupportedOperator`, `OptionError`, `OutputError`.
    """
    module = lower(graph, shapes, target, tiles)
    if polish is not None:
        module = replace(module, functions=polish(module.functions, module.work))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {folder.parent}: {error}", "Choose a folder you may write to") from error
    try:
        counted = _compiled(module, target, work / CODE, cache)
        weights_sha = write_parameters(module.parameters, work / WEIGHTS)
        manifest = _manifest(graph, module, shapes, target, pad or {})
        manifest["work"] = {name: count for name, count in counted.items() if count}
        manifest["sha256"] = {CODE: file_sha256(work / CODE), WEIGHTS: weights_sha}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _replace(work, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", "Make room or choose another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _compiled(module: Module, target: Target, path: Path, cache: Path | None) -> dict[str, int]:
    """Compile to `path` with kernels that the cache has; returns the operations of one call by kernel."""
    if target.kind == "cuda":
        executable = tvm.compile(module.functions, target=tvm_target(target))
        # This TVM keeps kernels as CUDA source, which is compiled once here: what nvcc refuses is no artifact.
        compile_cuda(_cuda_source(executable.mod), target, path.with_name(CUBIN))
        executable.export_library(str(path), fcompile=linker(target))
        return dict(module.work)
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        linked = link(module.functions, Objects(cache or Path(scratch), target))
        try:
            linked.executable.export_library(str(path), fcompile=linker(target))
        except RuntimeError as error:
            reason = next((line for line in reversed(str(error).splitlines()) if "error" in line.lower()), "")
            hint = "Make room, and check that the C compiler works (optimize doctor)"
            raise OutputError(f"{path.parent.parent} got no code, linking failed: {reason[-300:]}", hint) from error
    return {linked.names[name]: count for name, count in module.work.items() if name in linked.names}


def _cuda_source(module: Any) -> str:
    """The source of all device code below a module."""
    own = module.inspect_source("cuda") if module.kind == "cuda" else ""
    return str(own) + "".join(_cuda_source(part) for part in module.imports)


def _manifest(
    graph: OnnxGraph, module: Module, shapes: Sequence[Shapes], target: Target, pad: Mapping[str, float]
) -> dict[str, Any]:
    first = module.programs[0]
    buckets = []
    for index, (program, arguments) in enumerate(zip(module.programs, module.arguments, strict=True)):
        buckets.append({
            "function": function_name(index),
            "inputs": {name: list(program.shape(name)) for name in program.inputs},
            "outputs": {name: list(program.shape(name)) for name in program.outputs},
            "parameters": list(arguments),
        })  # fmt: skip
    return {
        "format": FORMAT,
        "inputs": [_describe(spec.name, str(first.dtype(spec.name)), spec.shape) for spec in graph.inputs],
        "outputs": [_describe(spec.name, str(first.dtype(spec.name)), spec.shape) for spec in graph.outputs],
        "buckets": buckets,
        "pad": dict(pad),
        "threads": target.threads,
        "target": target.key(),
        "machine": machine_of(target),
        "requires": [*amx.without(target.features), *required(module.functions.functions.values())],
        "versions": versions(),
        "model": graph.fingerprint(),
    }


def _describe(name: str, dtype: str, shape: Sequence[int | str | None]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def _replace(work: Path, folder: Path) -> None:
    """Put a finished folder in place; in one that exists, file by file, the manifest last."""
    if not folder.exists():
        work.replace(folder)
        return
    for file in sorted(work.iterdir(), key=lambda file: file.name == MANIFEST):
        file.replace(folder / file.name)
