"""The tiles of a build when a tuner chooses them: every template's space behind one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewriter.core.target import Target
from rewriter.runtimes.tvm import flash_space, reference
from rewriter.runtimes.tvm.database import Subject
from rewriter.runtimes.tvm.gemm_space import GemmSpace
from rewriter.runtimes.tvm.kernels.attention import Attention
from rewriter.runtimes.tvm.kernels.attention import Tile as FlashTile
from rewriter.runtimes.tvm.kernels.gemm import Precision
from rewriter.runtimes.tvm.space import source_version
from rewriter.runtimes.tvm.tiles import Tiles
from rewriter.runtimes.tvm.tuning import Tuner


def tuned_tiles(target: Target, tuner: Tuner) -> Tiles:
    """Tiles of GEMMs and attentions as the tuner finds them."""
    return Tiles(
        target,
        lambda spec, default: tuner.best(GemmSpace(spec, target, default)),
        lambda spec, precision: tuner.best(FlashSpace(spec, target, precision)),
    )


@dataclass(frozen=True)
class FlashSpace:
    """One attention on one target; see `flash_space` for its tiles."""

    spec: Attention
    target: Target
    precision: Precision

    @property
    def subject(self) -> Subject:
        """By the form of the mask, how operands lie, and sizes."""
        form, sizes = flash_space.subject_of(self.spec)
        names = ("attention", "emit", "expressions", "flash", "flash_bf16", "gather", "packing", "skipping", "vectors")
        return Subject.of(f"flash:{form}", sizes, self.target, self.precision, source_version(*names))

    def choices(self) -> list[FlashTile]:
        """See `flash_space.candidates`."""
        return flash_space.candidates(self.spec, self.target)

    def predicted(self, choice: FlashTile) -> float:
        """Rows computed for one that is there: all else is equal for a model without caches."""
        whole = -(-self.spec.S // choice.queries) * choice.queries
        return whole / self.spec.S if choice.queries > self.spec.S else 1.0

    def choice(self, fields: Mapping[str, Any]) -> FlashTile:
        """A tile from its fields."""
        return FlashTile(**fields)

    def run(self, choice: FlashTile) -> _FlashRun:
        """See `Space.run`."""
        return _FlashRun(self, choice)


class _FlashRun:
    """A runner with a reference."""

    def __init__(self, space: FlashSpace, choice: FlashTile) -> None:
        self._spec, self._precision = space.spec, space.precision
        self._runner = flash_space.FlashRunner(space.spec, choice, space.target, space.precision)
        self.sets = self._runner.sets

    def error(self) -> float:
        """Against numpy; see `Run.error`."""
        found = self._runner.result()
        operands = [part.numpy() for part in self._runner.operands[0][:3]]
        wanted = reference.attention(self._spec, operands)
        return float(np.abs(found.reshape(wanted.shape) - wanted).max()) / flash_space.TOLERANCE[self._precision]

    def seconds(self, index: int) -> float:
        """One run on one set of operands."""
        return self._runner.seconds(index)
