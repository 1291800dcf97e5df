"""Everything a run can be asked for, in one frozen object. Flags and their help are generated from these fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rewriter.core.errors import OptionError

Effort = Literal["quick", "normal", "thorough"]
Runtime = Literal["tvm", "onnxruntime", "openvino", "torch", "auto"]
Emit = Literal["artifact", "static-library"]
Tuner = Literal["none", "templates", "metaschedule"]
Precision = Literal["fp32", "bf16", "int8", "any"]

MOST_BUCKETS = 32


@dataclass(frozen=True)
class MaxDrop:
    """How much the metric may fall: percentage points (``1%``) or relative to the baseline (``1%rel``)."""

    fraction: float = 0.01
    relative: bool = False

    def __str__(self) -> str:
        return f"{self.fraction * 100:g}%{'rel' if self.relative else ''}"

    @classmethod
    def parse(cls, text: str) -> MaxDrop:
        """The inverse of `str`; raises `OptionError`."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*(rel)?\s*", text)
        if not match or not 0.0 < float(match[1]) < 100.0:
            raise OptionError(f"--max-drop {text!r} is not a share", "Write 1% (percentage points) or 1%rel (relative)")
        return cls(float(match[1]) / 100.0, match[2] is not None)


def parse_duration_s(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds; raises `OptionError`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise OptionError(f"{text!r} is not a duration", "Write 90s, 10m or 1.5h")
    return float(match[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``input_ids=1x128`` as a name and sizes; raises `OptionError`."""
    match = re.fullmatch(r"\s*([^=\s]+)=([0-9]+(?:x[0-9]+)*)\s*", text)
    if not match or "0" in match[2].split("x"):
        raise OptionError(f"--shape {text!r} is not a shape", "Write the input's name and its sizes: input_ids=1x128")
    return match[1], tuple(int(size) for size in match[2].split("x"))


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` as both; raises `OptionError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise OptionError(f"{text!r} is not an address", "Write HOST:PORT, such as 127.0.0.1:9190")
    return host, int(port)


@dataclass(frozen=True)
class Options:
    """One run of `optimize`. Times in seconds; `None` means decide for me."""

    target: str = field(default="cpu", metadata={"help": "hardware to run on: cpu or llvm (this machine's processor)"})
    data: Path | None = field(
        default=None, metadata={"help": ".npz with one array per input, or .jsonl/.txt text with --tokenizer"}
    )
    tokenizer: Path | None = field(default=None, metadata={"help": "folder with tokenizer.json, for text data"})
    metric: str | None = field(
        default=None, metadata={"help": "what must not fall (default: chosen from outputs and labels, and said)"}
    )
    max_drop: MaxDrop = field(
        default_factory=MaxDrop,
        metadata={"help": "how far the metric may fall: 1%% (points) or 1%%rel (relative)", "parse": MaxDrop.parse},
    )
    shapes: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict,
        metadata={"help": "sizes to optimise for, such as input_ids=1x128; may be repeated", "flag": "--shape"},
    )
    shape_histogram: Path | None = field(
        default=None, metadata={"help": "JSON of how often each length comes: sizes are built for it and timed over it"}
    )
    buckets: int | None = field(
        default=None, metadata={"help": "how many sizes to build for (default: while one more saves 2%% of the time)"}
    )
    runtime: Runtime = field(
        default="tvm",
        metadata={
            "help": "what runs the result; auto times all that are installed and keeps the fastest",
            "choices": ("tvm", "onnxruntime", "openvino", "torch", "auto"),
        },
    )
    precision: Precision = field(
        default="any",
        metadata={
            "help": "number format that linear layers may use where the accuracy allows it",
            "choices": ("fp32", "bf16", "int8", "any"),
        },
    )
    effort: Effort = field(
        default="normal", metadata={"help": "how long to search", "choices": ("quick", "normal", "thorough")}
    )
    output: Path | None = field(default=None, metadata={"help": "folder to write", "flag": "-o", "long": "--output"})
    cache_dir: Path | None = field(default=None, metadata={"help": "where measurements and builds are kept"})
    seed: int = field(default=0, metadata={"help": "seed of everything that is drawn"})
    max_time_s: float | None = field(
        default=None, metadata={"help": "stop searching after this long: 90s, 10m", "flag": "--max-time"}
    )
    passes: str | None = field(
        default=None, metadata={"help": "only these passes, such as head_pruning,ffn_pruning{width=1024}"}
    )
    allow_cache_change: bool = field(
        default=False, metadata={"help": "let the sizes of key/value caches in inputs and outputs change"}
    )
    plan: Path | None = field(default=None, metadata={"help": "rebuild from this plan.json instead of searching"})
    threads: int = field(default=1, metadata={"help": "threads the result will use"})
    compile_only: bool = field(
        default=False, metadata={"help": "build for --target, which need not be here, and time nothing"}
    )
    emit: Emit = field(
        default="artifact",
        metadata={
            "help": "with --compile-only: a folder for TVM's runtime, or a static library with a C header",
            "choices": ("artifact", "static-library"),
        },
    )
    rpc: str | None = field(
        default=None, metadata={"help": "HOST:PORT of a TVM RPC tracker: compile here, time on the device it lends"}
    )
    key: str | None = field(default=None, metadata={"help": "the name under which the device is known to the tracker"})
    tuner: Tuner = field(
        default="templates",
        metadata={
            "help": "what is tuned by measuring: nothing, our kernel templates, or operators without one too",
            "choices": ("none", "templates", "metaschedule"),
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "say what would be tried, then stop"})

    def __post_init__(self) -> None:
        if self.buckets is not None and not 0 < self.buckets <= MOST_BUCKETS:
            raise OptionError(f"--buckets {self.buckets} is not from 1 to {MOST_BUCKETS}", "Each costs compile time")
        if self.shape_histogram is not None and self.emit != "artifact":
            raise OptionError(f"--emit {self.emit} has one shape", "Leave --shape-histogram out")
        if self.emit != "artifact" and not self.compile_only:
            raise OptionError(f"--emit {self.emit} times nothing", "Add --compile-only")
        with_tvm = self.runtime in ("tvm", "auto")
        if self.tuner == "metaschedule" and (self.compile_only or self.rpc is not None or not with_tvm):
            raise OptionError(f"--tuner {self.tuner} measures kernels of TVM on this machine", "Leave the others out")
        if (self.rpc is None) != (self.key is None):
            raise OptionError("--rpc and --key belong together", "Write --rpc HOST:PORT --key NAME")
        if self.rpc is not None:
            parse_address(self.rpc)
            if self.compile_only:
                raise OptionError("--compile-only times nothing, --rpc is for timing", "Leave one out")
