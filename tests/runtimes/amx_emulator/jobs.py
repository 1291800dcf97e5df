"""What the tests of AMX call in a worker. Modules that load TVM are imported by the jobs that need it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx, target
from tests.runtimes.amx_emulator import EMULATOR

KINDS = ("ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileload", "tilestore", "tdpbf16ps", "tdpb8")


@cache
def emulator() -> ctypes.CDLL | None:
    """The emulator, put in front of the worker's own handler of signals; the processor then seems to have AMX."""
    path = os.environ.get(EMULATOR)
    if not path:
        return None
    library = ctypes.CDLL(path)
    library.amx_install()
    library.amx_count.restype = ctypes.c_long
    with tempfile.NamedTemporaryFile("w", suffix=".cpuinfo", delete=False) as file:
        file.write(target.CPUINFO.read_text().replace("\nflags\t\t:", "\nflags\t\t: amx_tile amx_bf16 amx_int8"))
    target.CPUINFO = Path(file.name)
    return library


def begin(permission: bool = True) -> bool:
    """Make this process one that has AMX, and ask for it."""
    emulator()
    return permission and amx.permitted()


def counts() -> dict[str, int]:
    """Tile instructions so far; empty where the processor runs them itself."""
    library = emulator()
    return {} if library is None else {name: library.amx_count(kind) for kind, name in enumerate(KINDS)}


def instruction(path: Path, name: str, *arguments: Any, permission: bool = True) -> list[np.ndarray]:
    """Call a function of a library; arrays go in by address and come back as they are then."""
    begin(permission)
    held = [np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value for value in arguments]
    function = getattr(ctypes.CDLL(str(path)), name)
    function(*(value.ctypes.data_as(ctypes.c_void_p) if isinstance(value, np.ndarray) else ctypes.c_int64(value)
               for value in held))  # fmt: skip
    return [value for value in held if isinstance(value, np.ndarray)]


def local(threads: int = 1) -> Target:
    """This machine, as it is found when asked for."""
    begin()
    return target.detect("cpu", threads)


def gemm(
    spec: Any, tile: Any, a: np.ndarray, b: np.ndarray, extra: list[np.ndarray]
) -> tuple[np.ndarray, dict[str, int]]:
    """One GEMM from fp32 operands, rounded by the kernel that feeds it, and the tile instructions that it took."""
    from rewriter.runtimes.tvm.kernels import formats
    from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS
    from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
    from tests.runtimes.tvm import harness

    begin()
    words = Quantise(a.shape, spec.precision, multiple=MATRIX_WORDS)
    shapes, dtypes = zip(*words.outputs, strict=True)
    rounded = harness.run_kernel(make_quantise(words), [a], *shapes, dtypes=dtypes)
    weight = formats.weight_operands(b, spec.precision, spec.precision, spec.lanes * tile.vectors, matrix_unit=True)
    compiled, before = tiled(formats.make(spec, tile), spec.threads), counts()
    (result,) = harness.call_kernel(compiled, [*rounded, *weight, *extra], (*spec.leading, spec.N))
    return result, {name: count - before[name] for name, count in counts().items()}


def tiled(function: Any, threads: int) -> Any:
    """A kernel compiled for this processor with AMX, whatever vectors it has."""
    import tvm

    from rewriter.runtimes.tvm.target import tvm_target

    here = local(threads)
    if threads > 1:
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=tvm_target(here))["kernel"]


def build_and_run(
    model: Path, feeds: Mapping[str, np.ndarray], folder: Path, threads: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A saved graph compiled for this machine, loaded and run; its outputs and the tile instructions of the run."""
    from rewriter.graph.onnx import load as load_graph
    from rewriter.runtimes.tvm.compile import build
    from rewriter.runtimes.tvm.load import load

    begin()
    shapes = [{name: array.shape for name, array in feeds.items()}]
    executable = load(build(load_graph(model), shapes, folder, local(threads)))
    before = counts()
    outputs = executable.run(feeds)
    return outputs, {name: count - before[name] for name, count in counts().items()}


def flash(spec: Any, tile: Any, inputs: list[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, dict[str, int]]:
    """One attention and the tile instructions that it took."""
    from rewriter.runtimes.tvm.kernels.amx_flash import make_flash_amx
    from tests.runtimes.tvm import harness

    begin()
    compiled, before = tiled(make_flash_amx(spec, tile), spec.threads), counts()
    (result,) = harness.call_kernel(compiled, inputs, shape)
    return result, {name: count - before[name] for name, count in counts().items()}


def peak(precision: Any, turns: int = 3, repeats: int = 2) -> tuple[float, dict[str, int], int]:
    """The measured peak, the tile instructions of measuring it, and the operations of one call."""
    from rewriter.runtimes.tvm import amx_peak
    from rewriter.runtimes.tvm.kernels.amx_peak import operations

    here, before = local(), counts()
    rate = amx_peak.products_per_s(here, precision, turns, repeats)
    return rate, {name: count - before[name] for name, count in counts().items()}, operations(turns, precision)
