"""A plan on disk: ``plan.json`` says what was done and to which model, ``plan.safetensors`` holds what was solved.

Together they give the same sites, and so the same graph byte for byte, on the same model without any data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rewriter.core.errors import DataError, OutputError
from rewriter.core.option import Plan
from rewriter.core.site import AttentionSite, LinearSite, Site
from rewriter.graph.onnx import OnnxGraph

FORMAT = 1
_JSON, _TENSORS = "plan.json", "plan.safetensors"
_LINEAR = "linear"


def save_plan(folder: Path, graph: OnnxGraph, plan: Plan, before: Iterable[Site], after: Iterable[Site]) -> Path:
    """Write both files into an existing folder; returns the path of ``plan.json``.

    `before` are the sites of `graph` as recognised, `after` the rewritten ones (those equal to before are left out).
    Raises `OutputError` if the folder cannot be written.
    """
    originals = {site.id: site for site in before}
    tensors: dict[str, np.ndarray] = {}
    sites: dict[str, dict[str, Any]] = {}
    for site in after:
        before_it, site = _comparable(originals[site.id], site)
        changes = dict(changes_between(before_it, site))
        arrays = {path: value for path, value in changes.items() if isinstance(value, np.ndarray)}
        tensors |= {f"{site.id}:{path}": _storable(array) for path, array in arrays.items()}
        plain = {path: value for path, value in changes.items() if path not in arrays}
        dtypes = {path: str(array.dtype) for path, array in arrays.items()}
        if changes:
            kind = {"kind": _LINEAR} if isinstance(site, LinearSite) else {}
            sites[site.id] = {"fields": plain, "arrays": dtypes, **kind}
    text = {"format": FORMAT, "model": graph.fingerprint(), "plan": [str(o) for o in plan.options], "sites": sites}
    try:
        save_file(tensors, folder / f"{_TENSORS}.part")
        (folder / f"{_JSON}.part").write_text(json.dumps(text, indent=2) + "\n")
        for name in (_TENSORS, _JSON):
            (folder / f"{name}.part").replace(folder / name)
    except (OSError, SafetensorError) as problem:
        raise OutputError(
            f"cannot write the plan to {folder}: {problem}", "Free space or choose another folder"
        ) from problem
    return folder / _JSON


def load_plan(path: Path) -> Plan:
    """The choices alone, from ``plan.json`` or its folder. Raises `DataError`."""
    return _plan_of(_read(_json_of(path)), path)


def restore(graph: OnnxGraph, sites: Iterable[Site], path: Path) -> tuple[Plan, dict[str, Site]]:
    """The plan and its rewritten sites by id, weights included, with no data.

    `path` is ``plan.json`` or its folder, `sites` those recognised in `graph`. Raises `DataError` if the files are
    missing or damaged, or were made for another model.
    """
    file = _json_of(path)
    text = _read(file)
    if text["model"] != graph.fingerprint():
        raise DataError(
            f"{file} was made for another model",
            "Give the model it was made from, or search again with --data to solve the weights anew",
        )
    known = {site.id: site for site in sites}
    tensors = _tensors(file.with_name(_TENSORS))
    found: dict[str, Site] = {}
    for name, entry in text["sites"].items():
        if name not in known:
            raise DataError(f"{file} changes {name}, which this model does not have", "Use the version that wrote it")
        changes = dict(entry["fields"])
        for field, dtype in entry["arrays"].items():
            if f"{name}:{field}" not in tensors:
                raise DataError(f"{file.with_name(_TENSORS)} lacks {name}:{field}", "Copy both files of the plan")
            changes[field] = _original(tensors[f"{name}:{field}"], dtype)
        start = _linear_start(known[name]) if entry.get("kind") == _LINEAR else known[name]
        found[name] = with_changes(start, changes, file)
    return _plan_of(text, file), found


def _comparable(before: Site, after: Site) -> tuple[Site, Site]:
    """Two sites of one kind: what an attention was replaced by is told against its values and output."""
    if isinstance(after, LinearSite) and isinstance(before, AttentionSite):
        return _linear_start(before), dataclasses.replace(after, replaces=before)
    return before, after


def _linear_start(site: Site) -> LinearSite:
    assert isinstance(site, AttentionSite) and site.output is not None
    return LinearSite(site.id, site.value, site.output, site)


def changes_between(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that differ, by dotted path, down to arrays and plain values; a part that is new is given whole."""
    for field in dataclasses.fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        path = prefix + field.name
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            yield from changes_between(old, new, f"{path}.")
        elif isinstance(new, np.ndarray):
            if not (isinstance(old, np.ndarray) and old.dtype == new.dtype and np.array_equal(old, new)):
                yield path, new
        elif old is not new and (isinstance(old, np.ndarray) or old != new):
            yield path, list(new) if isinstance(new, tuple) else new


def with_changes(site: Any, changes: Mapping[str, Any], file: Path) -> Any:
    """The inverse of `changes_between`."""
    here: dict[str, Any] = {}
    deeper: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if not hasattr(site, name):
            raise DataError(f"{file} changes {path}, which is unknown here", "Use the version that wrote it")
        if rest:
            deeper.setdefault(name, {})[rest] = value
        else:
            here[name] = _tuples(value)
    parts = {name: with_changes(getattr(site, name), inner, file) for name, inner in deeper.items()}
    return dataclasses.replace(site, **here, **parts)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _storable(array: np.ndarray) -> np.ndarray:
    """Exact bytes under a dtype that the file format knows (bfloat16 and the like travel as integers)."""
    plain = np.ascontiguousarray(array)
    return plain if plain.dtype.kind in "fiub" else plain.view(f"uint{8 * plain.dtype.itemsize}")


def _original(array: np.ndarray, dtype: str) -> np.ndarray:
    if str(array.dtype) == dtype:
        return array
    import ml_dtypes

    return array.view(np.dtype(getattr(ml_dtypes, dtype)))


def _json_of(path: Path) -> Path:
    return path / _JSON if path.is_dir() else path


def _read(file: Path) -> dict[str, Any]:
    hint = "Give the plan.json of an earlier run"
    try:
        text = json.loads(file.read_text())
    except OSError as problem:
        raise DataError(f"cannot read {file}: {problem.strerror}", hint) from problem
    except ValueError as problem:
        raise DataError(f"{file} is no JSON: {problem}", hint) from problem
    if not isinstance(text, dict) or not {"format", "model", "plan", "sites"} <= set(text):
        raise DataError(f"{file} is no plan", hint)
    if text["format"] != FORMAT:
        raise DataError(
            f"{file} has format {text['format']}, this version reads {FORMAT}", "Use the version that wrote it"
        )
    return text


def _plan_of(text: Mapping[str, Any], file: Path) -> Plan:
    if not all(isinstance(line, str) for line in text["plan"]):
        raise DataError(f"{file} is no plan", "Give the plan.json of an earlier run")
    return Plan.parse("\n".join(text["plan"]))


def _tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(file))
    except OSError as problem:
        raise DataError(f"cannot read {file}: {problem}", "Copy both files of the plan") from problem
    except SafetensorError as problem:
        raise DataError(f"{file} is damaged: {problem}", "Copy both files of the plan again") from problem
