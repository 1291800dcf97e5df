"""The files of an artifact and how they are checked before any of their code runs."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewriter.core.errors import ModelError
from rewriter.core.target import Target
from rewriter.runtimes.tvm.instruction_sets import architecture
from rewriter.runtimes.tvm.target import missing_features

FORMAT = 1
CODE, WEIGHTS, MANIFEST = "model.so", "model.weights.safetensors", "model.json"
CUBIN = "model.cubin"  # of GPU targets: the kernels as machine code; model.cu beside it is their source


def versions() -> dict[str, str]:
    """Versions that compiled code is tied to."""
    return {name: _version(name) for name in ("apache-tvm", "apache-tvm-ffi")}


# Reading a package's metadata takes a millisecond, and every kernel asks.
_version = cache(version)


def engine_key() -> dict[str, str]:
    """What measurements of compiled code depend on besides the target: TVM and our own kernels and lowering."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    return {**versions(), "kernels": digest.hexdigest()[:16]}


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_of(target: Target) -> dict[str, str]:
    """What decides on which machines the code can be loaded at all."""
    return {"kind": target.kind, "arch": target.arch}


def _check_machine(folder: Path, machine: Mapping[str, str]) -> None:
    here = architecture(platform.machine())
    if machine.get("kind", "llvm") != "llvm":
        hint = "Load model.so with TVM on a machine with such a device"
        raise ModelError(f"{folder} was compiled for {machine['kind']}, which this program only compiles for", hint)
    if machine.get("arch", here) != here:
        hint = "Copy it to such a machine, or time it there with --rpc"
        raise ModelError(f"{folder} was compiled for {machine['arch']}, this machine is {here}", hint)


def read_manifest(folder: Path, here: bool = True) -> dict[str, Any]:
    """The checked manifest of an artifact: complete, unaltered, made for this TVM and, if `here`, this processor.

    Raises `ModelError` for everything else, before any code of the artifact is loaded.
    """
    rebuild = "Build the model again on this machine"
    for name in (MANIFEST, CODE, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no artifact: {name} is missing", "Give the folder that optimize wrote")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        found, hashes, needed = manifest["format"], manifest["sha256"], tuple(manifest["requires"])
        built_with = manifest["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / MANIFEST} cannot be read: {error}", rebuild) from error
    if found != FORMAT:
        raise ModelError(f"{folder} has format {found}, this program reads {FORMAT}", rebuild)
    if built_with != versions():
        raise ModelError(f"{folder} was built with {built_with}, installed is {versions()}", rebuild)
    if here:
        _check_machine(folder, manifest.get("machine", {}))
    missing = missing_features(needed) if here else ()
    if missing:
        raise ModelError(f"{folder} needs a processor with {', '.join(missing)}, which this one lacks", rebuild)
    for name in (CODE, WEIGHTS):
        if file_sha256(folder / name) != hashes.get(name):
            raise ModelError(f"{folder / name} is not the file that was built: its hash differs", rebuild)
    return manifest
