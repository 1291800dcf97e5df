"""The C compilers of this machine: for itself, for other processors, and for GPUs."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewriter.core.errors import OptionError
from rewriter.core.target import Target
from rewriter.runtimes.tvm.instruction_sets import architecture

_LOCAL = ("cc", "gcc", "clang")
_TIMEOUT_S = 300.0


def c_compiler(target: Target) -> list[str]:
    """The command that compiles and links C for a target; raises `OptionError` when this machine has none."""
    here = architecture(platform.machine())
    if not target.triple or (target.arch == here and sys.platform == "linux"):
        found = next((path for name in _LOCAL if (path := shutil.which(name))), None)
        if found is not None:
            return [found]
    short = f"{target.arch or here}-linux-gnu"
    for name in dict.fromkeys((target.triple, short)):
        cross = shutil.which(f"{name}-gcc") if name else None
        if cross is not None:
            return [cross]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", short]
    hint = f"Install one: apt-get install gcc-{short.replace('_', '-')}, or pip install ziglang"
    raise OptionError(f"no C compiler for {target.triple or 'this machine'} was found", hint)


def archiver(target: Target) -> list[str]:
    """The command that makes a static library, from the family of the compiler."""
    compiler = c_compiler(target)
    if "ziglang" in compiler:
        return [sys.executable, "-m", "ziglang", "ar"]
    own = f"{compiler[0].removesuffix('-gcc')}-ar"
    found = own if own != f"{compiler[0]}-ar" and shutil.which(own) else shutil.which("ar")
    if found is None:
        raise OptionError("no ar was found, which makes static libraries", "Install binutils")
    return [found]


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What a compiler printed; raises `OptionError` with the end of it when it failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        detail = (done.stderr or done.stdout).strip()[-800:]
        raise OptionError(f"{Path(words[0]).name} failed with exit code {done.returncode}: {detail}")
    return done.stdout


def linker(target: Target) -> Callable[..., None] | None:
    """What TVM calls to make a shared library of objects; None for its own choice, which serves this machine."""
    if not target.triple:
        return None
    compiler = c_compiler(target)

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        run([*compiler, "-shared", "-fPIC", "-o", output, *objects, *(options or ())])

    link.get_target_triple = lambda: target.triple  # type: ignore[attr-defined]
    return link


def compile_cuda(source: str, target: Target, output: Path) -> None:
    """CUDA C to a cubin for the target's GPU, by nvcc or NVRTC. Raises `OptionError` where neither is installed."""
    from tvm.support import nvcc

    if shutil.which("nvcc"):
        plain = output.with_suffix(".cu")
        plain.write_text(source)
        run(["nvcc", "-cubin", "-O3", "--std=c++17", "-w", f"-arch={target.mcpu}", plain, "-o", output])
        return
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        hint = "Install the CUDA toolkit (nvcc), or pip install cuda-bindings; no GPU is needed"
        raise OptionError("no CUDA compiler was found", hint)
    output.write_bytes(nvcc.compile_cuda(source, target_format="cubin", arch=target.mcpu, compiler="nvrtc"))
