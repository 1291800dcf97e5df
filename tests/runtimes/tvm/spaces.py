"""Spaces whose candidates misbehave on purpose; they travel to workers, so they are plain data."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.core.target import Target
from rewriter.runtimes.tvm.database import Subject


@dataclass(frozen=True)
class Act:
    """What a candidate does: sleeps for `seconds` when it runs, after something bad if `kind` says so."""

    kind: str = "right"
    seconds: float = 0.002


class ActRun:
    sets = 1

    def __init__(self, space: ActSpace, act: Act) -> None:
        self.act = act
        with Path(space.log).open("a") as file:
            file.write(f"{act.kind}\n")
        if act.kind == "segfault":
            ctypes.string_at(0)
        if act.kind == "abort":
            os.abort()
        if act.kind == "hang":
            time.sleep(60)
        if act.kind == "killed" and Path(space.log).read_text().count("killed") == 1:
            os.kill(os.getpid(), 9)

    def error(self) -> float:
        return {"wrong": 7.0, "nan": float("nan")}.get(self.act.kind, 0.5)

    def seconds(self, index: int) -> float:
        time.sleep(self.act.seconds)
        return self.act.seconds


@dataclass(frozen=True)
class ActSpace:
    target: Target
    acts: tuple[Act, ...]
    log: str
    source: str = "1"

    @property
    def subject(self) -> Subject:
        return Subject.of("acts", (len(self.acts),), self.target, "float32", self.source)

    def choices(self) -> tuple[Act, ...]:
        return self.acts

    def predicted(self, choice: Act) -> float:
        return 1.0 if choice.kind != "ruled out" else 9.0

    def choice(self, fields: Mapping[str, Any]) -> Act:
        return Act(**fields)

    def run(self, choice: Act) -> ActRun:
        return ActRun(self, choice)
