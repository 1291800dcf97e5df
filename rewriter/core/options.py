"""Everything a run can be asked for, in one frozen object. Flags and their help are generated from these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Effort = Literal["quick", "normal", "thorough"]
Runtime = Literal["tvm", "onnxruntime", "auto"]
Precision = Literal["fp32", "bf16", "int8", "any"]


@dataclass(frozen=True)
class MaxDrop:
    """How much the metric may fall: percentage points (``1%``) or relative to the baseline (``1%rel``)."""

    fraction: float = 0.01
    relative: bool = False

    def __str__(self) -> str:
        return f"{self.fraction * 100:g}%{'rel' if self.relative else ''}"


@dataclass(frozen=True)
class Options:
    """One run of `optimize`. Times in seconds; `None` means decide for me."""

    target: str = "cpu"
    data: Path | None = None
    tokenizer: Path | None = None
    metric: str | None = None
    max_drop: MaxDrop = field(default_factory=MaxDrop)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runtime: Runtime = "tvm"
    precision: Precision = "fp32"
    effort: Effort = "normal"
    output: Path | None = None
    cache_dir: Path | None = None
    seed: int = 0
    max_time_s: float | None = None
    passes: str | None = None
    plan: Path | None = None
    dry_run: bool = False
    threads: int | None = None
