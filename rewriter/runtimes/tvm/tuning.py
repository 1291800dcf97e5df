"""Which choice of a kernel's own small space is fastest here, found by measuring a handful in a guarded process.

Choices are ranked and pruned by a roofline model; what is left is built, checked against a reference and timed in turn
with the default, on normal values and rotating buffers: warm weights and uniform inputs mislead by up to two times.
Hopeless ones are dropped after a few looks. One shape takes about a second, and asking again nothing.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from time import monotonic
from typing import Any

import numpy as np

from rewriter.core.errors import UnsupportedOperator
from rewriter.core.target import Target
from rewriter.runtimes.tvm.database import TuningDatabase
from rewriter.runtimes.tvm.space import Choice, Space, text_of
from rewriter.runtimes.tvm.specialise import ENGINE
from rewriter.runtimes.workers import Worker, WorkerFailure, pinnable

MOST = 4  # choices measured per shape, the default among them
PRUNED = 1.4  # a choice that is predicted to take this much longer than the best is not measured
MEASURE_S = 0.3  # of timing per shape, for all choices together
LOOKS, HOPELESS = 3, 1.15  # after three blocks, a choice this much slower than the best is dropped
DECIDES = 0.98  # a challenger must take less than this share of the default's time
BUDGET_S = 12.0  # for all new shapes of one build; what is left takes its default and is measured another time
LIMIT_S = 20.0  # for one call: a candidate that takes longer hangs
_START_S = 60.0
_MEMORY_BYTES = 8 << 30
_BLOCK, _READY = "rewriter.runtimes.tvm.trial:block", "rewriter.runtimes.tvm.trial:ready"
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
_logger = logging.getLogger("rewriter")


class Tuner:
    """Finds choices in a database, or measures them and records what it found, failures too.

    Without `measure` shapes that the database does not know take their default. `budget_s` bounds the time that one
    tuner spends; `limit_s` that of one call of a candidate.
    """

    def __init__(
        self,
        target: Target,
        database: TuningDatabase,
        measure: bool = True,
        budget_s: float = BUDGET_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.target, self.database, self.measure = target, database, measure
        self.budget_s, self.limit_s = budget_s, limit_s
        self.spent_s, self.measured, self.left_out = 0.0, 0, 0

    def best(self, space: Space) -> Choice:
        """The best known choice. Raises `UnsupportedOperator` when every choice of the kernel was found to fail."""
        known = self._known(space)
        if known is not None:
            return known
        first = self._usable(space)[0]
        if not self.measure or self.target.elsewhere or len(space.choices()) == 1:
            return first
        if self.spent_s >= self.budget_s:
            self.left_out += 1
            return first
        begun_s = monotonic()
        try:
            return self._search(space)
        finally:
            self.spent_s += monotonic() - begun_s

    def _known(self, space: Space) -> Choice | None:
        found = self.database.find(space.subject)
        if found is None:
            return None
        try:
            return space.choice(found["choice"])
        except (TypeError, KeyError):
            return None

    def _usable(self, space: Space) -> list[Choice]:
        """The choices that have not failed, the default first."""
        reasons = {text_of(one): self.database.failure(space.subject, text_of(one)) for one in space.choices()}
        usable = [one for one in space.choices() if not reasons[text_of(one)]]
        if not usable:
            detail = "every choice of it failed here: " + "; ".join(sorted(set(reasons.values())))
            raise UnsupportedOperator(ENGINE, space.subject.kernel, "", detail[:400])
        return usable

    def _search(self, space: Space) -> Choice:
        worker = guarded(self.target.threads)
        if isinstance(problem := worker.call(_READY, space, timeout_s=_START_S), WorkerFailure):
            _logger.warning("tuning: no process to measure in, defaults are used: %s", problem)
            self.measure = False
            return self._usable(space)[0]
        self.measured += 1
        while True:
            usable = self._usable(space)
            contest = _Contest(space, shortlist(space, usable), worker, self)
            if contest.run():
                return contest.finish()


class _Contest:
    """One measurement of one kernel. The first choice is what all are compared with."""

    def __init__(self, space: Space, choices: Sequence[Choice], worker: Worker, tuner: Tuner) -> None:
        self.space, self.worker, self.database, self.limit_s = space, worker, tuner.database, tuner.limit_s
        self.first = choices[0]
        before = {text_of(one): self.database.measured(space.subject, text_of(one)) for one in choices}
        # What an earlier run, ended before it was done, found hopeless is not measured again.
        self.running = [one for one in choices if one is self.first or before[text_of(one)] <= HOPELESS]
        self.samples: dict[str, list[float]] = {text_of(one): [] for one in self.running}
        self.tried = len(choices)

    def run(self) -> bool:
        """Rounds until time is up; False if the first choice failed, so that another must take its place."""
        end_s, rounds = float("inf"), 0
        while rounds < LOOKS or monotonic() < end_s:
            for choice in list(self.running):
                if not self._block(choice) and choice is self.first:
                    return False
            rounds += 1
            if rounds == 1:
                # Compiling and checking came with the first round.
                end_s = monotonic() + MEASURE_S
            if rounds == LOOKS:
                self._note()
            self.running = contenders(self.running, self.samples)
            if len(self.running) == 1 and rounds >= LOOKS:
                break
        return True

    def finish(self) -> Choice:
        """Write down and return what won: the first, unless another beats it clearly."""
        ratios = {text_of(one): self._ratio(one) for one in self.running}
        best = min(self.running, key=lambda one: ratios[text_of(one)])
        chosen = best if ratios[text_of(best)] < DECIDES else self.first
        self._note()
        result = {
            "choice": asdict(chosen),
            "seconds": float(np.median(self.samples[text_of(chosen)])),
            "default_seconds": float(np.median(self.samples[text_of(self.first)])),
            "tried": self.tried,
        }
        self.database.add(self.space.subject, result)
        return chosen

    def _block(self, choice: Choice) -> bool:
        """One block of runs; a choice that fails is written down and out."""
        found = self._called(choice)
        if isinstance(found, WorkerFailure) and found.exit_code in _FROM_OUTSIDE and found.kind == "crash":
            _logger.warning("tuning: a process was ended from outside and its candidate is tried again: %s", found)
            found = self._called(choice)
        if not isinstance(found, WorkerFailure):
            self.samples[text_of(choice)].append(float(np.median(found)))
            return True
        _logger.info("tuning: %s with %s failed: %s", self.space.subject.kernel, text_of(choice), found)
        self.database.add_failure(self.space.subject, text_of(choice), str(found)[-300:])
        self.running = [one for one in self.running if one is not choice]
        return False

    def _called(self, choice: Choice) -> Any:
        if self.worker.pid is None:
            # Loading TVM again after a crash is no fault of the candidate that comes next.
            self.worker.call(_READY, self.space, timeout_s=_START_S)
        return self.worker.call(_BLOCK, self.space, choice, timeout_s=self.limit_s)

    def _ratio(self, choice: Choice) -> float:
        """How long a choice takes against the first, block by block."""
        pairs = zip(self.samples[text_of(choice)], self.samples[text_of(self.first)], strict=False)
        return float(np.median([own / other for own, other in pairs]))

    def _note(self) -> None:
        for choice in self.running:
            self.database.add_measured(self.space.subject, text_of(choice), self._ratio(choice))


def shortlist(space: Space, usable: Sequence[Choice]) -> list[Choice]:
    """The first of the usable choices, then those that the model does not rule out; at most `MOST`."""
    first, *others = usable
    least = min(space.predicted(one) for one in usable)
    return [first, *[one for one in others if space.predicted(one) <= PRUNED * least][: MOST - 1]]


def contenders(running: Sequence[Choice], samples: Mapping[str, Sequence[float]]) -> list[Choice]:
    """The choices that may still win, and the first, which all are compared with: time goes to where it decides."""
    least = {text_of(one): min(samples[text_of(one)]) for one in running}
    if len(samples[text_of(running[0])]) < LOOKS:
        return list(running)
    best = min(least.values())
    return [one for one in running if one is running[0] or least[text_of(one)] <= HOPELESS * best]


@cache
def guarded(threads: int) -> Worker:
    """The process in which candidates run, started when first needed; pinned, and ended with this process."""
    return Worker("tuning", threads, _MEMORY_BYTES, cores=pinnable(threads))
