"""Finds the passes: every public module of the package `passes` that lies beside `rewriter`, one class each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from rewriter.core.errors import OptionError
from rewriter.core.rewrite import Pass


def discover() -> Mapping[str, Pass]:
    """One instance of every pass by name, in order of application; adding a pass is adding its file.

    Raises `OptionError` if another package named `passes` shadows ours, or a file does not hold exactly one pass.
    """
    package = importlib.import_module("passes")
    folder = Path(str(package.__file__)).resolve().parent
    expected = Path(__file__).resolve().parents[2] / "passes"
    if folder != expected:
        raise OptionError(
            f"the package 'passes' was imported from {folder}, not from {expected}",
            "Remove the other package from PYTHONPATH or start Python elsewhere",
        )
    modules = sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.name.startswith("_"))
    found = [_only_pass(f"passes.{module}") for module in modules]
    return {one.name: one for one in sorted(found, key=lambda one: (one.order, one.name))}


def _only_pass(module_name: str) -> Pass:
    module = importlib.import_module(module_name)
    own = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Pass) and item.__module__ == module_name
    ]
    if len(own) != 1 or own[0].name != module_name.rpartition(".")[2]:
        raise OptionError(
            f"{module_name} must define exactly one Pass named like its file", "See docs/writing-a-pass.md"
        )
    return own[0]()
