"""The C text of a library: header, model and example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from rewriter.runtimes.tvm.embedded.steps import Region, Routine

# The type in C, and DLPack's code and bits.
TYPES: Mapping[str, tuple[str, int, int]] = {
    "float32": ("float", 2, 32), "float64": ("double", 2, 64), "float16": ("uint16_t", 2, 16),
    "int64": ("int64_t", 0, 64), "int32": ("int32_t", 0, 32), "int16": ("int16_t", 0, 16), "int8": ("int8_t", 0, 8),
    "uint64": ("uint64_t", 1, 64), "uint32": ("uint32_t", 1, 32), "uint16": ("uint16_t", 1, 16),
    "uint8": ("uint8_t", 1, 8), "bool": ("uint8_t", 6, 8),
}  # fmt: skip
_KEYWORDS = frozenset({"int", "float", "double", "char", "void", "long", "short", "return", "default", "register"})


@dataclass(frozen=True)
class Entry:
    """A function of the library with the names of what goes in and comes out."""

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    routine: Routine


def identifiers(names: Sequence[str], taken: Sequence[str] = ("weights", "workspace")) -> tuple[str, ...]:
    """C identifiers for names, all different."""
    found: list[str] = list(taken)
    for name in names:
        base = re.sub(r"\W", "_", name, flags=re.ASCII) or "x"
        base = f"_{base}" if base[0].isdigit() or base in _KEYWORDS else base
        unique, number = base, 2
        while unique in found:
            unique, number = f"{base}_{number}", number + 1
        found.append(unique)
    return tuple(found[len(taken) :])


def header(entries: Sequence[Entry], weights_bytes: int, kept: str) -> str:
    """``model.h``."""
    workspace = max(entry.routine.workspace_bytes for entry in entries)
    lines = [
        "/* One compiled model. Written by optimize; link libmodel.a and the C maths library (-lm).",
        "   weights: the content of model.weights.bin; workspace: scratch memory; both 64-byte aligned.",
        "   Every function returns 0, or another number when model_error() says what is wrong.",
        "   Not to be called from two threads at once with one workspace. */",
        "#ifndef MODEL_H", "#define MODEL_H", "#include <stddef.h>", "#include <stdint.h>",
        "#ifdef __cplusplus", 'extern "C" {', "#endif", "",
        f"#define MODEL_WEIGHTS_BYTES ((size_t){weights_bytes})",
        f"#define MODEL_WORKSPACE_BYTES ((size_t){workspace})", "",
        f"/* {kept} */", "",
    ]  # fmt: skip
    for entry in entries:
        routine = entry.routine
        for name, region in [*zip(entry.inputs, routine.inputs, strict=True), *_outputs(entry)]:
            lines.append(f"/* {name}: {'x'.join(map(str, region.shape)) or 'scalar'} {region.dtype} */")
        lines += [f"{_signature(entry)};", ""]
    lines += ["const char *model_error(void);", "", "#ifdef __cplusplus", "}", "#endif", "#endif", ""]
    return "\n".join(lines)


def _outputs(entry: Entry) -> list[tuple[str, Region]]:
    return list(zip(entry.outputs, entry.routine.outputs, strict=True))


def _signature(entry: Entry) -> str:
    routine = entry.routine
    arguments = ["const void *weights", "void *workspace"]
    arguments += [
        f"const {TYPES[region.dtype][0]} *{name}" for name, region in zip(entry.inputs, routine.inputs, strict=True)
    ]
    arguments += [f"{TYPES[region.dtype][0]} *{name}" for name, region in _outputs(entry)]
    return f"int {entry.function}({', '.join(arguments)})"


def model(entries: Sequence[Entry], symbols: Mapping[str, str], constants: bytes, tiles: bool) -> str:
    """``model.c``: one function per routine, calling kernels by their C symbols. `tiles`: whether any uses AMX."""
    lines = ['#include "runtime.h"', '#include "model.h"', ""]
    content = ",".join(map(str, constants)) or "0"
    lines += [f"static const unsigned char constants[] __attribute__((aligned(64))) = {{{content}}};", ""]
    used = sorted({step.kernel for entry in entries for step in entry.routine.steps})
    lines += [f"extern kernel_function {symbols[name]};" for name in used]
    for entry in entries:
        lines += ["", _signature(entry), "{", "  (void)constants;"]
        lines.append(f"  if (!runtime_ready(weights, workspace, {int(tiles)})) return -1;")
        for name, region in zip(entry.inputs, entry.routine.inputs, strict=True):
            lines.append(f"  memcpy({_address(region)}, {name}, {region.nbytes});")
        for step in entry.routine.steps:
            lines += _call(symbols[step.kernel], step.operands)
        for name, region in _outputs(entry):
            lines.append(f"  memcpy({name}, {_address(region)}, {region.nbytes});")
        lines += ["  return 0;", "}"]
    return "\n".join([*lines, ""])


def _address(region: Region) -> str:
    return f"(unsigned char *){region.place} + {region.offset}"


def _call(symbol: str, operands: Sequence[Region]) -> list[str]:
    tensors = []
    for region in operands:
        _, code, bits = TYPES[region.dtype]
        sizes = ", ".join(map(str, region.shape)) or "1"
        strides = ", ".join(str(prod(region.shape[axis + 1 :])) for axis in range(len(region.shape))) or "1"
        data = f"{_address(region)}, {len(region.shape)}, {code}, {bits}"
        tensors.append(f"    tensor({data}, (int64_t[]){{{sizes}}}, (int64_t[]){{{strides}}})")
    return [
        "  {", "  DLTensor operands[] = {", ",\n".join(tensors), "  };",
        f"  if (runtime_call({symbol}, operands, {len(operands)})) return -1;", "  }",
    ]  # fmt: skip


def example(entry: Entry) -> str:
    """``example.c``: reads the weights and each input as a raw file, runs, writes the outputs as one raw stream."""
    inputs = list(zip(entry.inputs, entry.routine.inputs, strict=True))
    names = ", ".join(["weights", "workspace", *entry.inputs, *entry.outputs])
    usage = " ".join(["model.weights.bin", *(f"{name}.bin" for name in entry.inputs)])
    lines = [
        f"/* ./example {usage} > outputs.bin */",
        '#include <stdio.h>', '#include <stdlib.h>', '#include "model.h"', "",
        "static void *load(const char *path, size_t bytes)", "{",
        "  void *data = aligned_alloc(64, (bytes + 63) / 64 * 64);",
        '  FILE *file = fopen(path, "rb");',
        "  if (!data || !file || fread(data, 1, bytes, file) != bytes) {",
        '    fprintf(stderr, "cannot read %zu bytes of %s\\n", bytes, path);', "    exit(2);", "  }",
        "  fclose(file);", "  return data;", "}", "",
        "int main(int count, char **paths)", "{",
        f"  if (count != {len(inputs) + 2}) return 2;",
        "  void *weights = load(paths[1], MODEL_WEIGHTS_BYTES);",
        "  void *workspace = aligned_alloc(64, MODEL_WORKSPACE_BYTES);",
    ]  # fmt: skip
    for index, (name, region) in enumerate(inputs):
        lines.append(f"  const {TYPES[region.dtype][0]} *{name} = load(paths[{index + 2}], {region.nbytes});")
    lines += [f"  static {TYPES[region.dtype][0]} {name}[{prod(region.shape)}];" for name, region in _outputs(entry)]
    lines += [
        f"  if ({entry.function}({names})) {{",
        '    fprintf(stderr, "%s\\n", model_error());',
        "    return 1;",
        "  }",
    ]
    lines += [f"  fwrite({name}, sizeof {name}, 1, stdout);" for name in entry.outputs]
    return "\n".join([*lines, "  return 0;", "}", ""])
