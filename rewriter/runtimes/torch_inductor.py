"""Compiling an exported program with TorchInductor, its scratch files in a folder of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InductorError
from torch.export import ExportedProgram

from rewriter.core.errors import ModelError

_SETTINGS = {
    "freezing": True,
    # The processor says what it has; trying each instruction set out takes as long as compiling the model.
    "cpp.vec_isa_ok": True,
    # These would lie outside of our folder, and pay from the second model on only.
    "cpp_cache_precompile_headers": False,
}


def compile_package(program: ExportedProgram, place: Path, scratch: Path, threads: int) -> None:
    """Write the package `place`, code for `threads` threads. Raises `ModelError` where it cannot be compiled."""
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_cache_dir(str(scratch)), _threads(threads), torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(place), inductor_configs=_SETTINGS)
    except (InductorError, CppCompileError, TorchDynamoException, RuntimeError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"TorchInductor cannot compile the program: {first}", "Use another runtime") from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
