"""Which of the sizes built serves given inputs, how they are filled up to it, and how outputs are cut back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.errors import DataError

Window = tuple[slice, ...]
_REMEMBERED = 4096  # distinct shapes; requests of one service have far fewer


class TooLarge(DataError):
    """Inputs beyond, or beside, every size that was built."""


@dataclass(frozen=True)
class Fit:
    """A bucket for inputs of certain shapes; a window is the part of an array that is real, None for all of it."""

    bucket: Mapping[str, Any]
    windows: Mapping[str, Window | None]
    crops: tuple[Window | None, ...]


class Buckets:
    """The sizes of an artifact, by its manifest."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.inputs: list[dict[str, Any]] = manifest["inputs"]
        self.outputs: list[dict[str, Any]] = manifest["outputs"]
        self.pad: Mapping[str, float] = manifest["pad"]
        self.all: list[dict[str, Any]] = sorted(manifest["buckets"], key=_volume)
        self._fits: dict[tuple[tuple[int, ...], ...], Fit] = {}

    def fit(self, arrays: Mapping[str, NDArray[Any]]) -> Fit:
        """The smallest bucket that holds these inputs. Raises `TooLarge` when none does."""
        key = tuple([arrays[spec["name"]].shape for spec in self.inputs])
        found = self._fits.get(key)
        if found is None:
            if len(self._fits) >= _REMEMBERED:
                self._fits.clear()
            found = self._fits[key] = self._found({name: array.shape for name, array in arrays.items()})
        return found

    def padded(self, name: str, array: NDArray[Any], fit: Fit) -> NDArray[Any]:
        """An input filled up to its bucket."""
        return filled(array, fit.bucket["inputs"][name], fit.windows[name], self.pad.get(name, 0.0))

    def _found(self, shapes: Mapping[str, tuple[int, ...]]) -> Fit:
        for bucket in self.all:
            if all(self._holds(name, shapes[name], tuple(built)) for name, built in bucket["inputs"].items()):
                return self._fit_of(bucket, shapes)
        given, largest = _listed(shapes), _listed(self.all[-1]["inputs"])
        what = "the largest is" if self.pad else "nothing is padded, and among the sizes built is"
        hint = "Build with their lengths (--shape-histogram), or load with beyond='onnxruntime'"
        raise TooLarge(f"inputs {given} fit no size that was built; {what} {largest}", hint)

    def _holds(self, name: str, given: tuple[int, ...], built: tuple[int, ...]) -> bool:
        if given == built:
            return True
        fits = len(given) == len(built) and all(g <= b for g, b in zip(given, built, strict=True))
        return fits and name in self.pad

    def _fit_of(self, bucket: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Fit:
        sizes: dict[str, tuple[int, int]] = {}
        windows: dict[str, Window | None] = {}
        for spec in self.inputs:
            name = spec["name"]
            given, built = shapes[name], tuple(bucket["inputs"][name])
            windows[name] = None if given == built else tuple(slice(0, size) for size in given)
            for axis, label in enumerate(spec["shape"]):
                if isinstance(label, str):
                    sizes[label] = (given[axis], built[axis])
        return Fit(bucket, windows, tuple(_crop(output["shape"], sizes) for output in self.outputs))


def filled(array: NDArray[Any], shape: Sequence[int], window: Window | None, pad: float) -> NDArray[Any]:
    """An array in the window of a larger one that is padding otherwise."""
    if window is None:
        return array
    whole = np.full(tuple(int(size) for size in shape), pad, array.dtype)
    whole[window] = array
    return whole


def _crop(labels: list[Any], sizes: Mapping[str, tuple[int, int]]) -> Window | None:
    """What to keep of an output whose axes have these labels: None for all."""
    window = []
    for label in labels:
        real, built = sizes.get(label, (None, None)) if isinstance(label, str) else (None, None)
        window.append(slice(0, real) if real != built else slice(None))
    return tuple(window) if any(part.stop is not None for part in window) else None


def _listed(shapes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _volume(bucket: Mapping[str, Any]) -> int:
    return sum(int(np.prod(shape)) for shape in bucket["inputs"].values())
