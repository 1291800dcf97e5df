"""What a value of the ONNX graph becomes while it is written as fx: a tensor, sizes, or a constant.

Sizes are what ONNX computes with small vectors of whole numbers. In fx they are whole numbers themselves, symbolic
where an axis is dynamic, so that the arithmetic on them disappears and dynamic axes stay dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from rewriter.core.refusal import Refused

Tensorlike = Any  # an `fx.Proxy`: it has every operator of a tensor, which its type does not say
Size = int | Any  # a whole number, or an `fx.Proxy` that stands for one
SIZES = 16  # longer vectors of whole numbers are data


@dataclass(frozen=True)
class Sizes:
    """A vector of sizes; `scalar` if it is one number without an axis."""

    items: tuple[Size, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Constant:
    """A number or array that is no parameter, by the name it has in ONNX."""

    array: np.ndarray
    name: str

    @property
    def number(self) -> float | int | bool | None:
        """The number, if it is a single one."""
        return self.array.reshape(-1)[0].item() if self.array.size == 1 else None


Term = fx.Proxy | Sizes | Constant


def constant(array: np.ndarray, name: str) -> Sizes | Constant:
    """A constant of the graph: sizes where it may be some."""
    if array.dtype == np.int64 and array.ndim <= 1 and array.size <= SIZES:
        return Sizes(tuple(int(item) for item in array.reshape(-1)), array.ndim == 0)
    return Constant(array, name)


def integers(term: Term | None) -> list[int]:
    """Whole numbers that do not depend on any input; raises `Refused` for others."""
    items: Sequence[Any] = term.items if isinstance(term, Sizes) else ()
    if isinstance(term, Constant):
        items = term.array.reshape(-1).tolist()
    if term is None or not all(isinstance(item, int) for item in items) or isinstance(term, fx.Proxy):
        raise Refused("fx-form", "a number that should be constant is computed")
    return [int(item) for item in items]
