"""A runtime for tests: an artifact is a text file that says what running it does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import Feeds


class FakeRuntime:
    """``add`` works and writes down the feeds it meets, ``die`` ends its process when it runs.

    ``falter`` is killed once, as if by the system, in its fifth run; ``doomed`` every time.

    ``slow`` takes 2 ms per token and writes down the shapes it runs on.
    """

    name = "fake"

    def available(self) -> Refusal | None:
        return None

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        (folder / "artifact").write_text("add")
        return folder / "artifact"

    def load(self, artifact: Path, threads: int) -> FakeExecutable:
        return FakeExecutable(artifact.read_text().strip(), artifact.with_suffix(".seen"))


class FakeExecutable:
    def __init__(self, what: str, seen: Path) -> None:
        self.what, self.seen, self.runs = what, seen, 0

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        x = np.asarray(feeds["x"])
        if self.what == "slow":
            time.sleep(0.002 * x.shape[-1])
            with self.seen.with_suffix(".runs").open("a") as file:
                file.write("x".join(map(str, x.shape)) + " ")
        return {"y": x + 1}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        def call() -> None:
            if self.what == "die":
                os._exit(9)
            self.runs += 1
            first = not self.seen.with_suffix(".faltered").exists()
            if self.what == "doomed" or (self.what == "falter" and self.runs == 5 and first):
                self.seen.with_suffix(".faltered").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with self.seen.open("a") as file:
                file.write(f"{int(feeds['x'][0])} ")

        return call
