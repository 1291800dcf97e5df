"""Make a Transformer you already have faster on the machine you have, and prove that it still does its job.

>>> import rewriter
>>> result = rewriter.optimize("model.onnx", data="data.npz", max_drop="1%", output="optimized")
>>> model = rewriter.load("optimized")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.api import Model, Result, apply, inspect, load, optimize, sites, verify
    from rewriter.core.errors import UserError
    from rewriter.core.option import Option, Plan
    from rewriter.core.rewrite import Pass

__all__ = [
    "Model",
    "Option",
    "Pass",
    "Plan",
    "Result",
    "UserError",
    "apply",
    "inspect",
    "load",
    "optimize",
    "sites",
    "verify",
]

_HOMES = {
    "Option": "rewriter.core.option",
    "Pass": "rewriter.core.rewrite",
    "Plan": "rewriter.core.option",
    "UserError": "rewriter.core.errors",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import rewriter` and `optimize --help` stay instant.
    if name not in __all__:
        raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "rewriter.api")), name)
