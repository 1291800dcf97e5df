"""Which version of our own code computed something: a digest of its sources."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def source_digest(*packages: str) -> str:
    """sha256, in 16 hex digits, over all Python files of these packages, in any process the same."""
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else []:
            for source in sorted(Path(folder).rglob("*.py")):
                digest.update(source.relative_to(folder).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
