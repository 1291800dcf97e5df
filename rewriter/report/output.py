"""The output folder: written beside its place and moved there whole, so that it never holds half an artifact."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rewriter.core.errors import ModelError, OutputError

MARKER = "report.json"
TVM = "tvm"
COMPILED = "compiled.json"  # what --compile-only writes instead


def check_output(folder: Path) -> None:
    """Raise `OutputError` early if the folder holds something that is not ours, or cannot be made."""
    if folder.is_file():
        raise OutputError(f"the output {folder} is a file", "Name a folder with -o")
    if folder.exists() and any(folder.iterdir()) and not _ours(folder):
        raise OutputError(
            f"the output folder {folder} exists and holds something else", "Name another folder, or empty this one"
        )
    parent = existing_parent(folder)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the output folder {folder} cannot be made: {parent} is not writable", "Name another folder")


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise `OutputError` if the disk that will hold the folder has less free space than needed."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise OutputError(
            f"no room for the result in {folder}: {free / 1e6:,.0f} MB free, about {needed_bytes / 1e6:,.0f} MB needed",
            "Free some room or name a folder on another disk with -o or --cache-dir",
        )


def existing_parent(folder: Path) -> Path:
    """The nearest ancestor that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def kept_runtime(folder: Path) -> str:
    """The runtime that a folder's report says what was kept is for; ``tvm`` where it does not say."""
    report = folder / MARKER
    if not report.is_file():
        return TVM
    try:
        found = str(json.loads(report.read_text())["best"]["runtime"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{report} is damaged: {error}", "Run optimize again") from None
    return TVM if found == "not measured" else found


def _ours(folder: Path) -> bool:
    for name, key in ((MARKER, "variants_timed"), (COMPILED, "compiled_only")):
        with contextlib.suppress(OSError, ValueError):
            if key in json.loads((folder / name).read_text()):
                return True
    return False


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """``with writing(out) as scratch:`` fill `scratch`; on success it becomes `out`, on failure nothing changed."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        _replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _replace(scratch: Path, folder: Path) -> None:
    scratch.chmod(0o755)
    if not folder.exists():
        scratch.rename(folder)
        return
    check_output(folder)
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / "was")
    try:
        scratch.rename(folder)
    except OSError:
        (old / "was").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
