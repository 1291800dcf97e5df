"""Inputs for runs without data: drawn from a seed, within the ranges the graph allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.errors import OptionError
from rewriter.graph.onnx import TensorSpec


def draw_inputs(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    ranges: Mapping[str, tuple[int, int]],
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """One array per input: floats standard normal, integers uniform in ``ranges[name]`` (low, high exclusive).

    An integer or boolean input without a range is looked up in no table, so it is a mask: ones, then zeros, from
    a length between half and all of its last axis, different in each row. The first row is whole.
    Raises `OptionError` when a shape is missing.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if spec.name not in shapes:
            raise OptionError(f"the sizes of input {spec} are not known", f"Give them: --shape {spec.name}=1x128")
        shape = shapes[spec.name]
        if spec.dtype.kind == "f":
            drawn[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.name in ranges:
            drawn[spec.name] = rng.integers(*ranges[spec.name], size=shape).astype(spec.dtype)
        else:
            drawn[spec.name] = _mask(shape, rng).astype(spec.dtype)
    return drawn


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    if not shape:
        return np.ones((), dtype=np.bool_)
    lengths = rng.integers(max(1, shape[-1] // 2), shape[-1] + 1, size=(*shape[:-1], 1))
    lengths.reshape(-1)[:1] = shape[-1]
    return np.asarray(np.arange(shape[-1]) < lengths)
