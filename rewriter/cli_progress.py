"""Progress for a terminal: one line per stage, a live bar with the time left where the stream is a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn


class ProgressLines:
    """Prints each stage when it ends and, between, how far it is and how long everything may still take.

    The time left is the announced seconds of what is not done, scaled by how the announced seconds of what is done
    compared with the clock.
    """

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        self.bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[left]}"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.expected_s: dict[str, float] = {}
        self.finished: set[str] = set()
        self.part: dict[str, float] = {}
        self.started_s = time.monotonic()

    def __enter__(self) -> ProgressLines:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def expect(self, stages_s: Mapping[str, float]) -> None:
        """Remember the announced stages."""
        self.expected_s.update(stages_s)

    def begin(self, stage: str, what: str) -> None:
        """Show what is being done now, and how long is left."""
        self.part[stage] = 0.0
        self.expected_s.setdefault(stage, 1.0)
        self.console.print(
            f"[bold]{escape(stage):<10}[/bold] {escape(what)} [dim]({self._left()})[/dim]", soft_wrap=True
        )
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(escape(stage), total=1.0, left=self._left())

    def advance(self, stage: str, done: float, note: str) -> None:
        """Move the bar; a note becomes a line of its own."""
        self.part[stage] = done
        if note:
            self.console.print(f"{'':<10} {escape(note)}", soft_wrap=True)
        if self.task is not None:
            self.bar.update(self.task, completed=done, left=self._left())

    def end(self, stage: str, seconds: float) -> None:
        """Say how long the stage took."""
        self.finished.add(stage)
        self.part[stage] = 1.0
        if seconds >= 1.0:
            self.console.print(f"{'':<10} [dim]{escape(stage)} took {seconds:.0f} s[/dim]", soft_wrap=True)

    def _left(self) -> str:
        done_s = sum(self.expected_s[stage] * part for stage, part in self.part.items() if stage in self.expected_s)
        total_s = sum(self.expected_s.values())
        spent_s = time.monotonic() - self.started_s
        pace = spent_s / done_s if done_s > 0.1 * total_s else 1.0
        left_s = max(0.0, (total_s - done_s) * min(max(pace, 0.3), 3.0))
        return f"about {left_s:.0f} s left" if left_s < 100 else f"about {left_s / 60:.0f} min left"
