"""In a guarded worker: build one choice of a kernel, check it against its reference, and time it.

Whatever a choice does (crash, hang, wrong numbers) happens to this process; the tuner in the parent writes it down.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from rewriter.runtimes.tvm.database import Subject
from rewriter.runtimes.tvm.space import Choice, Run, Space, text_of

BLOCK_S = 0.012
LEAST_RUNS, MOST_RUNS = 3, 200


@dataclass
class _Prepared:
    """The choices of one subject that were built and found right, with how often each has run."""

    subject: Subject | None = None
    runs: dict[str, tuple[Run, int]] | None = None


_now = _Prepared()


def block(space: Space, choice: Choice) -> list[float]:
    """Seconds of some runs of a choice on rotating operands. Raises RuntimeError when its result is wrong."""
    if _now.subject != space.subject or _now.runs is None:
        _now.subject, _now.runs = space.subject, {}
    name = text_of(choice)
    if name not in _now.runs:
        _now.runs[name] = (_checked(space, choice), 0)
    run, turn = _now.runs[name]
    samples: list[float] = []
    end_s = perf_counter() + BLOCK_S
    while len(samples) < LEAST_RUNS or (perf_counter() < end_s and len(samples) < MOST_RUNS):
        samples.append(run.seconds(turn % run.sets))
        turn += 1
    _now.runs[name] = (run, turn)
    return samples


def _checked(space: Space, choice: Choice) -> Run:
    run = space.run(choice)
    error = run.error()
    # Also not a number is wrong.
    if not error <= 1.0:
        raise RuntimeError(f"the result differs from the reference by {error:.3g} times what is tolerated")
    return run


def ready(space: Space) -> bool:
    """Whether this process can load what a space needs, as it must to unpack it: a fault of it is no candidate's."""
    return bool(space.choices())
