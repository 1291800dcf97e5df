"""The rewrites: one file, one class, one test each. Classes are loaded on first use: ``passes.HeadPruning``."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any


def __getattr__(name: str) -> Any:
    module = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    if not name[:1].isupper() or importlib.util.find_spec(f"{__name__}.{module}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
