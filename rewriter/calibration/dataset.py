"""Samples of a model's inputs, with what is known about each: its label, its split, the document it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.errors import DataError

Array = NDArray[Any]
Indices = NDArray[np.int64]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

UNLABELLED = -1


@dataclass(frozen=True)
class Batch:
    """Some samples as the model takes them. Rows of `feeds` beyond `indices` only fill up a fixed batch size."""

    indices: Indices
    feeds: dict[str, Array]


@dataclass(frozen=True)
class Dataset:
    """Inputs by name, the first axis of each being samples.

    `labels` are classes from 0 up (-1: none), `split` is 0 to calibrate, 1 to select, 2 to certify, `group` names the
    document a sample comes from; each (N,) int64 or None. `axes` are the axis names of the model's inputs.
    """

    inputs: Mapping[str, Array]
    labels: Indices | None = None
    split: Indices | None = None
    group: Indices | None = None
    axes: Mapping[str, tuple[int | str | None, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    def subset(self, indices: Sequence[int] | Indices) -> Dataset:
        """The samples at these positions, in this order."""
        rows = np.asarray(indices, dtype=np.int64)
        labels, split, group = (
            None if array is None else array[rows] for array in (self.labels, self.split, self.group)
        )
        return Dataset({name: array[rows] for name, array in self.inputs.items()}, labels, split, group, self.axes)

    def labelled(self) -> Dataset:
        """Only the samples that have a label."""
        return self.subset(np.flatnonzero(self.labels >= 0) if self.labels is not None else [])

    def content_hash(self) -> str:
        """sha256 over names, dtypes, shapes and content: the same data has the same hash in any process."""
        digest = hashlib.sha256()
        extra = {"labels": self.labels, "split": self.split, "group": self.group}
        for name, array in (*sorted(self.inputs.items()), *extra.items()):
            if array is not None:
                digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def sample_hashes(self) -> list[bytes]:
        """One hash per sample over its inputs: equal samples have equal hashes."""
        arrays = [np.ascontiguousarray(array) for _, array in sorted(self.inputs.items())]
        return [hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).digest() for row in range(len(self))]

    def deduplicate(self) -> Dataset:
        """Without repeated samples: of equal ones the first labelled stays, or else the first."""
        first: dict[bytes, int] = {}
        for row, key in enumerate(self.sample_hashes()):
            kept = first.setdefault(key, row)
            if self.labels is not None and self.labels[kept] < 0 <= self.labels[row]:
                first[key] = row
        return self if len(first) == len(self) else self.subset(sorted(first.values()))

    @property
    def padded_axis(self) -> str | None:
        """Name of the dynamic axis along which samples are padded, if an input says which positions are padding."""
        return self._mask_axis()

    def lengths(self) -> Indices | None:
        """True tokens per sample, or None if no input says which positions are padding.

        An input says so if it holds only zeros and ones, every sample of it is ones followed by zeros with at least one
        one, and it shares a dynamic axis with another input. Token types fail this: they start with zeros.
        """
        axis = self._mask_axis()
        return None if axis is None else self._used(axis)

    def batches(self, size: int, sort_by_length: bool = True, crop: bool = False) -> Iterator[Batch]:
        """All samples, `size` at a time (or the model's own fixed batch size), similar lengths together if wanted.

        `crop` cuts trailing positions where every input but the ids is zero in the whole batch: sound for a model that
        respects its mask and has no output along that axis, which `cropping_is_harmless` finds out.
        """
        axis = self._mask_axis()
        used = None if axis is None else self._used(axis)
        order = np.arange(len(self)) if used is None or not sort_by_length else np.argsort(used, kind="stable")
        fixed = {shape[0] for shape in self.axes.values() if shape and isinstance(shape[0], int)}
        size = int(min(fixed)) if fixed else size
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            filled = np.append(rows, np.full(size - len(rows), rows[-1])) if fixed else rows
            feeds = {name: array[filled] for name, array in self.inputs.items()}
            if crop and axis is not None and used is not None:
                feeds = self._cropped(feeds, axis, int(used[filled].max()))
            yield Batch(rows, feeds)

    def _positions(self, axis: str) -> dict[str, int]:
        """Which axis of each input carries this name, the sample axis aside."""
        return {
            name: shape.index(axis, 1) for name, shape in self.axes.items() if name in self.inputs and axis in shape[1:]
        }

    def _mask_axis(self) -> str | None:
        for name, shape in self.axes.items():
            axis = shape[1] if len(shape) == 2 else None
            if not isinstance(axis, str) or name not in self.inputs or len(self._positions(axis)) < 2:
                continue
            if _is_mask(self.inputs[name]):
                return axis
        return None

    def _used(self, axis: str) -> Indices:
        """Per sample, one more than the last position at which any zero-padded input on the axis is not zero."""
        used = np.zeros(len(self), dtype=np.int64)
        for name, position in self._positions(axis).items():
            array = np.moveaxis(self.inputs[name], position, 1)
            if array.ndim != 2 or not _is_binary(array):
                continue
            last = array.shape[1] - np.argmax(array[:, ::-1] != 0, axis=1)
            used = np.maximum(used, np.where((array != 0).any(1), last, 0))
        return used

    def _cropped(self, feeds: dict[str, Array], axis: str, length: int) -> dict[str, Array]:
        cuts = self._positions(axis)
        return {
            name: np.ascontiguousarray(np.moveaxis(np.moveaxis(array, cuts[name], 0)[:length], 0, cuts[name]))
            if name in cuts
            else array
            for name, array in feeds.items()
        }


def run_all(data: Dataset, run: Run, size: int = 32, crop: bool = False) -> dict[str, Array]:
    """Outputs of a model on all samples, in the samples' order; `run` maps feeds to outputs by name.

    Raises `DataError` when an output's first axis is not samples, or its other axes differ between batches.
    """
    collected: dict[str, list[Array]] = {}
    order: list[Indices] = []
    for batch in data.batches(size, crop=crop):
        order.append(batch.indices)
        rows = next(iter(batch.feeds.values())).shape[0]
        for name, value in run(batch.feeds).items():
            if value.ndim == 0 or value.shape[0] != rows:
                raise DataError(
                    f"output {name!r} has shape {value.shape} for {rows} samples: its first axis is not samples",
                    "Choose outputs with one row per sample",
                )
            collected.setdefault(name, []).append(np.asarray(value)[: len(batch.indices)])
    back = np.argsort(np.concatenate(order), kind="stable")
    return {name: _joined(name, parts)[back] for name, parts in collected.items()}


def cropping_is_harmless(data: Dataset, run: Run, tolerance: float = 1e-4) -> bool:
    """Whether the model gives the same outputs, in shape and value, when padding is cut off instead of masked.

    Tried on the shortest eight samples, where most is cut; `tolerance` is relative to each output's largest value.
    """
    used = data.lengths()
    if used is None:
        return False
    short = data.subset(np.argsort(used, kind="stable")[:8])
    padded, cropped = (run_all(short, run, len(short), crop=crop) for crop in (False, True))
    return all(
        value.shape == cropped[name].shape
        and bool(np.max(np.abs(value - cropped[name])) <= tolerance * np.max(np.abs(value)))
        for name, value in padded.items()
    )


def _joined(name: str, parts: list[Array]) -> Array:
    if len({part.shape[1:] for part in parts}) > 1:
        raise DataError(f"output {name!r} has other sizes in other batches", "Do not crop padding for this model")
    return np.concatenate(parts)


def _is_binary(array: Array) -> bool:
    return array.dtype == np.bool_ or (
        np.issubdtype(array.dtype, np.number) and bool(np.all((array == 0) | (array == 1)))
    )


def _is_mask(array: Array) -> bool:
    if array.ndim != 2 or array.shape[1] == 0 or not _is_binary(array):
        return False
    ones = array != 0
    return bool(ones[:, 0].all()) and not bool((~ones[:, :-1] & ones[:, 1:]).any())
