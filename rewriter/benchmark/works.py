"""What is timed: a model at one size in one number format, against whom, and how much faster it has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from rewriter.benchmark.entrants import (
    INDUCTOR,
    ONNXRUNTIME_FP32,
    ONNXRUNTIME_INT8,
    OPENVINO_BF16,
    OPENVINO_FP32,
    OPENVINO_INT8,
    Entrant,
    entrants_for,
    ours,
)
from rewriter.core.site import Precision

FASTEST = "the fastest peer"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Goal:
    """At least this many times the speed of an entrant, or of the fastest peer of the same number format."""

    against: str
    times: float


@dataclass(frozen=True)
class Work:
    """``MODELS/<model>/<model>.onnx`` with its inputs at `sizes`, of which each input takes as many as it has axes."""

    model: str
    sizes: tuple[int, ...]
    precision: Precision
    goals: tuple[Goal, ...] = (Goal(FASTEST, 1.3),)

    @property
    def shape(self) -> str:
        """As people write it."""
        return "x".join(map(str, self.sizes))

    @property
    def name(self) -> str:
        """Of the record on disk, and for ``--work``."""
        return f"{self.model}-{self.shape}-{self.precision}"

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """Ours first, which every ratio is of."""
        return entrants_for(self.precision)

    @property
    def peers(self) -> tuple[str, ...]:
        """Entrants of other makers in the same number format, among which the fastest is looked for."""
        return tuple(entrant.name for entrant in self.entrants if entrant.peer)


_HEADLINE: dict[Precision, tuple[Goal, ...]] = {
    "fp32": (Goal(ONNXRUNTIME_FP32, 1.3), Goal(INDUCTOR, 1.1), Goal(OPENVINO_FP32, 1.05)),
    "bf16": (Goal(OPENVINO_BF16, 1.7),),
    "int8": (Goal(ONNXRUNTIME_INT8, 3.5), Goal(OPENVINO_INT8, 1.5), Goal(ours("bf16"), 1.0)),
}
_OTHERS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("minilm", (1, 16)),
    ("minilm", (1, 512)),
    ("minilm", (8, 128)),
    ("decoder", (1, 512)),
    ("vit", (1, 3, 224, 224)),
)
WORKS: tuple[Work, ...] = (
    *(Work("minilm", (1, 128), precision, _HEADLINE[precision]) for precision in PRECISIONS),
    *(Work(model, sizes, precision) for model, sizes in _OTHERS for precision in PRECISIONS),
)
