"""A child that somebody else ended is no verdict on what it was doing: the call is made once more, and that is told."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

from rewriter.runtimes.workers import Worker, WorkerFailure

_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
_logger = logging.getLogger("rewriter")


def ended_from_outside(failure: WorkerFailure) -> bool:
    """Whether the process was killed rather than fell over: by the system out of memory, or by somebody's hand."""
    return failure.kind == "crash" and failure.exit_code in _FROM_OUTSIDE


def call_twice(worker: Worker, spec: str, *arguments: Any, timeout_s: float | None, told: Callable[[str], None]) -> Any:
    """``worker.call``, once more where the child was killed from outside; `told` gets a sentence about that.

    Returns what the last call gave: a value, or a `WorkerFailure`. Raises `UserError` as `Worker.call` does.
    """
    found = worker.call(spec, *arguments, timeout_s=timeout_s)
    if not isinstance(found, WorkerFailure) or not ended_from_outside(found):
        return found
    _logger.info("%s: %s; tried again", spec, found)
    again = worker.call(spec, *arguments, timeout_s=timeout_s)
    outcome = "and failed again" if isinstance(again, WorkerFailure) else "and succeeded"
    told(f"a child process was killed from outside ({found.detail}); its work was tried once more {outcome}")
    return again
