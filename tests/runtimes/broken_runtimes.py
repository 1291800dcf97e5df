"""Runtimes that go wrong in every way one can: absent, failing to build, ending their process while they are timed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rewriter.core.errors import UnsupportedOperator
from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import Executable
from rewriter.runtimes.onnxruntime import OnnxRuntime

Shapes = Mapping[str, tuple[int, ...]]


class Absent(OnnxRuntime):
    """Not installed."""

    def available(self) -> Refusal | None:
        return Refusal("not-installed", "absent is not installed; pip install absent")


class CannotBuild(OnnxRuntime):
    """Meets an operator it does not know."""

    def build(self, graph: OnnxGraph, shapes: Shapes, folder: Path, target: Target) -> Path:
        raise UnsupportedOperator("this one", "Gather", "embedding")


class EndsBuilding(OnnxRuntime):
    """Ends the process that builds it."""

    def build(self, graph: OnnxGraph, shapes: Shapes, folder: Path, target: Target) -> Path:
        os._exit(3)


class EndsTiming(OnnxRuntime):
    """Builds, and ends the process that times it."""

    def load(self, artifact: Path, threads: int) -> Executable:
        os._exit(4)
