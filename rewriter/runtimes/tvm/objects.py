"""Kernels as object files by content: what was compiled for one model is linked into the next.

A module is taken apart after TVM's graph passes: every kernel is compiled alone, under a name made of its content, and
kept; functions of the virtual machine only name the kernels they call. One more model costs the kernels it adds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import vm_build

from rewriter.core.target import Target
from rewriter.runtimes.tvm.artifact import versions
from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.target import tvm_target


@dataclass(frozen=True)
class Linked:
    """An executable to be exported, and under which name each kernel of the module went into it."""

    executable: Any
    names: Mapping[str, str]
    compiled: int


class Objects:
    """Object files of kernels in a folder, for one target. Several processes may use one folder."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        self._facts = json.dumps([target.key(), versions()], sort_keys=True)
        self.compiled = 0

    def symbol(self, name: str, function: Any) -> str:
        """The name of a kernel by its content; equal for equal kernels in any module and process."""
        plain = function.without_attr("global_symbol")
        digest = hashlib.sha256((self._facts + tvm.ir.save_json(plain)).encode()).hexdigest()[:12]
        return f"{name.rstrip('0123456789').rstrip('_')}_{digest}"

    def file(self, symbol: str, function: Any) -> Path:
        """The object file of a kernel, compiled now unless the folder has it."""
        kept = self.folder / f"{symbol}.o"
        if kept.exists():
            return kept
        module = tvm.IRModule({symbol: function.with_attr("global_symbol", symbol)})
        with _passes(function):
            content = _in_memory(tvm.tirx.build(module, target=tvm_target(self.target)))
        self.folder.mkdir(parents=True, exist_ok=True)
        # It appears whole or not at all, whoever else writes it.
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
            unfinished = Path(file.name)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(kept)
        finally:
            unfinished.unlink(missing_ok=True)
        self.compiled += 1
        return kept


def _passes(function: Any) -> Any:
    """Templates hold no memory that could be made smaller; finding that out would take a third of their compilation."""
    template = function.attrs is not None and emit.TEMPLATE in function.attrs
    return tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"] if template else None)


def _in_memory(library: Any) -> bytes:
    """The object file of a library. LLVM ends the process when it cannot write, so it never writes to a disk."""
    descriptor = os.memfd_create("object")
    try:
        library.write_to_file(f"/proc/self/fd/{descriptor}", "o")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def link(functions: Any, objects: Objects) -> Linked:
    """The module as an executable made of kernels from `objects`; what is missing there is compiled."""
    before, described = objects.compiled, tvm_target(objects.target)
    with described:
        module = relax.get_pipeline("default")(functions)
    names, libraries = {}, {}
    for variable, function in list(module.functions.items()):
        if not isinstance(function, tirx.PrimFunc):
            continue
        symbol = objects.symbol(variable.name_hint, function)
        names[variable.name_hint] = symbol
        if symbol not in libraries:
            libraries[symbol] = tvm.runtime.load_static_library(str(objects.file(symbol, function)), [symbol])
        module[variable] = relax.ExternFunc(symbol)
    constants = dict(module.attrs.get("const_name_to_constant", {})) if module.attrs else {}
    builder = relax.ExecBuilder()
    vm_build._vmcodegen(builder, module)
    ready = vm_build._vmlink(builder, described, None, ext_libs=list(libraries.values()), params=constants)
    return Linked(ready, names, objects.compiled - before)
