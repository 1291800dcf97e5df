from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

import passes
from rewriter.core import passes_registry
from rewriter.core.errors import OptionError
from rewriter.core.passes_registry import discover
from rewriter.core.rewrite import Pass


def test_one_pass_per_file_in_order_of_application() -> None:
    found = discover()
    folder = Path(str(passes.__file__)).parent
    assert set(found) == {file.stem for file in folder.glob("[a-z]*.py")}
    orders = [one.order for one in found.values()]
    assert orders == sorted(orders) and len(set(orders)) == len(orders)
    assert all(isinstance(one, Pass) and one.name == name for name, one in found.items())
    # Exact rewrites come before what is calibrated; how the result is written comes last.
    last = found["precision"].order
    assert all((one.order < 10 or one.order > last) == (one.kind == "exact") for one in found.values())


def test_a_package_that_shadows_ours_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = types.ModuleType("passes")
    other.__file__ = str(tmp_path / "passes" / "__init__.py")
    monkeypatch.setitem(sys.modules, "passes", other)
    with pytest.raises(OptionError, match="was imported from"):
        discover()


def test_a_file_without_a_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "passes.nothing", types.ModuleType("passes.nothing"))
    with pytest.raises(OptionError, match="exactly one Pass"):
        passes_registry._only_pass("passes.nothing")
