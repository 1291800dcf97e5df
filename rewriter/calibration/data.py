"""Data in: ``.npz`` arrays or text with a tokenizer, checked against the model's inputs before anything runs.

Data is data: nothing is unpickled, and declared sizes are capped before memory is taken for them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.calibration.dataset import (
    UNLABELLED,
    Array,
    Batch,
    Dataset,
    Indices,
    cropping_is_harmless,
    run_all,
)
from rewriter.calibration.draw import draw_inputs
from rewriter.core.errors import DataError
from rewriter.graph.onnx import TensorSpec

__all__ = ["UNLABELLED", "Batch", "Dataset", "cropping_is_harmless", "draw_inputs", "load_data", "run_all"]

FEWEST_SAMPLES = 32
LARGEST_BYTES = 16 * 2**30
ANNOTATIONS = ("labels", "split", "group")


def load_data(path: Path, graph_inputs: Sequence[TensorSpec], tokenizer: Path | None = None) -> Dataset:
    """Read a data file for a model with these inputs.

    ``.npz`` has one array per input, samples first, and optionally `labels`, `split` and `group`. ``.jsonl`` (fields
    text, and optionally text_pair, label, split, group) and ``.txt`` (one text per line) need `tokenizer`, a folder
    with ``tokenizer.json``. Raises `DataError` for whatever does not fit.
    """
    if not path.is_file():
        raise DataError(f"data file {path} does not exist", "Give a .npz, .jsonl or .txt file with --data")
    if path.suffix == ".npz":
        arrays = read_npz(path)
    elif path.suffix in (".jsonl", ".txt"):
        from rewriter.calibration.text import tokenized

        arrays = tokenized(path, graph_inputs, tokenizer)
    else:
        raise DataError(f"data file {path} has unknown type {path.suffix!r}", "Give a .npz, .jsonl or .txt file")
    return check_data(arrays, graph_inputs, str(path))


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of the file. Raises `DataError` if it is no .npz, is damaged, too large, or holds pickled objects."""
    hint = "Write it with numpy.savez, one array per input"
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(item.file_size for item in archive.infolist())
        if declared > LARGEST_BYTES:
            raise DataError(f"{path} unpacks to {declared / 2**30:.0f} GiB", f"Keep it under {LARGEST_BYTES >> 30} GiB")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, TypeError) as problem:
        if "pickle" in str(problem).lower() or "object" in str(problem).lower():
            raise DataError(f"{path} holds pickled Python objects, which are never loaded", hint) from problem
        raise DataError(f"{path} is damaged: {problem}", hint) from problem
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, MemoryError, SyntaxError) as problem:
        raise DataError(f"{path} cannot be read as .npz ({problem or type(problem).__name__})", hint) from problem


def check_data(arrays: dict[str, Array], graph_inputs: Sequence[TensorSpec], where: str) -> Dataset:
    """Arrays as a `Dataset` that fits the inputs, cast where that loses nothing. Raises `DataError`.

    Caches of a decoder that the data does not have are empty: every sample is then read from its start.
    """
    arrays = {**_empty_caches(arrays, graph_inputs), **arrays}
    _check_names(arrays, graph_inputs, where)
    inputs = {spec.name: _cast(arrays[spec.name], spec, where) for spec in graph_inputs}
    samples = _check_shapes(inputs, graph_inputs, where)
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DataError(f"{where}: {name!r} holds NaN or infinity, first in sample {row}", "Remove that sample")
    if samples < FEWEST_SAMPLES:
        raise DataError(
            f"{where}: {samples} samples are too few",
            f"Give at least {FEWEST_SAMPLES}; some hundreds to calibrate and some thousands to certify are better",
        )
    labels, split, group = (_annotation(arrays.get(name), name, samples, where) for name in ANNOTATIONS)
    return Dataset(inputs, labels, split, group, {spec.name: spec.shape for spec in graph_inputs})


def _empty_caches(arrays: dict[str, Array], graph_inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Caches (N, heads, 0, dim) for inputs that look like one and are not among the arrays."""
    given = [array for name, array in arrays.items() if name not in ANNOTATIONS and array.ndim]
    found: dict[str, Array] = {}
    for spec in graph_inputs:
        sizes = spec.shape
        cache = len(sizes) == 4 and isinstance(sizes[1], int) and isinstance(sizes[3], int)
        named = any(word in spec.name.lower() for word in ("past", "cache"))
        if cache and named and not isinstance(sizes[2], int) and spec.name not in arrays and given:
            found[spec.name] = np.zeros((len(given[0]), int(sizes[1] or 0), 0, int(sizes[3] or 0)), spec.dtype)
    return found


def _check_names(arrays: dict[str, Array], graph_inputs: Sequence[TensorSpec], where: str) -> None:
    wanted = [spec.name for spec in graph_inputs]
    missing = [name for name in wanted if name not in arrays]
    unknown = [name for name in arrays if name not in (*wanted, *ANNOTATIONS)]
    if not missing and not unknown:
        return
    problems = [f"has no array for input {', '.join(map(repr, missing))}"] if missing else []
    problems += [f"has {', '.join(map(repr, unknown))}, which is no input of the model"] if unknown else []
    raise DataError(
        f"{where} {' and '.join(problems)}; it holds {', '.join(map(repr, arrays)) or 'nothing'}",
        f"Name the arrays {', '.join(wanted)}, and optionally {', '.join(ANNOTATIONS)}",
    )


def _cast(array: Array, spec: TensorSpec, where: str) -> Array:
    """The array in the model's dtype, if every value survives; a narrower float is allowed to round."""
    have, want = array.dtype, spec.dtype
    if have == want:
        return array
    kinds = have.kind + want.kind
    if kinds == "ff":
        return array.astype(want)
    if set(kinds) <= set("iub") and _fits(array, want):
        return array.astype(want)
    raise DataError(
        f"{where}: {spec.name!r} is {have}, the model takes {want}", f"Convert it with .astype({str(want)!r})"
    )


def _fits(array: Array, want: np.dtype[Any]) -> bool:
    """Whether a whole-number or boolean dtype holds every value."""
    if array.size == 0 or array.dtype.kind == "b":
        return True
    low, high = (0, 1) if want.kind == "b" else (np.iinfo(want).min, np.iinfo(want).max)
    return low <= int(array.min()) and int(array.max()) <= high


def _check_shapes(inputs: dict[str, Array], graph_inputs: Sequence[TensorSpec], where: str) -> int:
    sizes: dict[str, tuple[int, str]] = {}
    for spec in graph_inputs:
        shape = inputs[spec.name].shape
        if len(shape) != len(spec.shape) or not shape:
            raise DataError(
                f"{where}: {spec.name!r} has {len(shape)} axes {shape}, the model takes {spec}",
                "Put samples first and keep the model's other axes",
            )
        for axis, (size, want) in enumerate(zip(shape[1:], spec.shape[1:], strict=True), 1):
            if isinstance(want, int) and size != want:
                raise DataError(
                    f"{where}: axis {axis} of {spec.name!r} is {size}, the model takes {want}",
                    f"Pad or cut it to {want}",
                )
            known, first = sizes.setdefault(want, (size, spec.name)) if isinstance(want, str) else (size, spec.name)
            if known != size:
                raise DataError(
                    f"{where}: axis {want!r} is {known} in {first!r} but {size} in {spec.name!r}", "Make them equal"
                )
    counts = {name: array.shape[0] for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"{where}: the arrays have different numbers of samples: {listing}", "Make them equal")
    return next(iter(counts.values()))


def _annotation(array: Array | None, name: str, samples: int, where: str) -> Indices | None:
    if array is None:
        return None
    if array.shape != (samples,):
        raise DataError(f"{where}: {name!r} has shape {array.shape}", f"Give one value per sample: ({samples},)")
    if name == "group" and array.dtype.kind in "US":
        return np.unique(array, return_inverse=True)[1].astype(np.int64)
    if array.dtype.kind not in "iub":
        raise DataError(f"{where}: {name!r} is {array.dtype}", "Give whole numbers")
    if name == "split" and not np.isin(array, (0, 1, 2)).all():
        raise DataError(
            f"{where}: 'split' holds {sorted(set(np.unique(array).tolist()) - {0, 1, 2})[:3]}",
            "Use 0 to calibrate, 1 to select, 2 to certify",
        )
    if name == "labels" and array.size and int(array.min()) < UNLABELLED:
        raise DataError(f"{where}: 'labels' holds {int(array.min())}", "Count classes from 0; -1 means no label")
    return array.astype(np.int64)
