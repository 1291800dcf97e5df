"""How the machine tells what it is doing, without knowing who listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger("rewriter")


class Listener(Protocol):
    """Told when a stage begins, moves on and ends."""

    def expect(self, stages_s: Mapping[str, float]) -> None:
        """The stages to come and a guess of their seconds."""

    def begin(self, stage: str, what: str) -> None:
        """A stage begins."""

    def advance(self, stage: str, done: float, note: str) -> None:
        """A stage has done this fraction (0 to 1) of its work."""

    def end(self, stage: str, seconds: float) -> None:
        """A stage has ended."""


class Silent:
    """Listens to nothing; for tests and for the Python API."""

    def expect(self, stages_s: Mapping[str, float]) -> None:
        """Nothing."""

    def begin(self, stage: str, what: str) -> None:
        """Nothing."""

    def advance(self, stage: str, done: float, note: str) -> None:
        """Nothing."""

    def end(self, stage: str, seconds: float) -> None:
        """Nothing."""


@dataclass
class Progress:
    """Passes stage events to a listener and to the log, and keeps the seconds each stage took."""

    listener: Listener = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    _current: str = ""

    def expect(self, stages_s: Mapping[str, float]) -> None:
        """Announce the stages to come, so that a listener can say how long is left."""
        self.listener.expect(stages_s)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[Progress]:
        """``with progress.stage("load", "reading the model"):`` times the block, also when it fails."""
        logger.info("%s: %s", name, what)
        self.listener.begin(name, what)
        start, before, self._current = self.clock(), self._current, name
        try:
            yield self
        finally:
            spent = self.clock() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._current = before
            self.listener.end(name, spent)
            logger.info("%s: %.1f s", name, spent)

    def advance(self, done: float, note: str = "") -> None:
        """Report the fraction of the current stage that is done."""
        if note:
            logger.info("%s: %s", self._current, note)
        self.listener.advance(self._current, min(1.0, done), note)
