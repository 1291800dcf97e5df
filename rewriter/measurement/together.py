"""Timing many artifacts of one runtime in one process: all are loaded, then run in turn, one run each per round.

For comparing options of the same engine at one thread count, where a process each would cost more than it tells. Runs
inside a worker (`rewriter.runtimes.workers`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rewriter.runtimes.base import of_spec, stopwatch


def time_together(
    runtime: str,
    artifacts: Sequence[str],
    feeds: Sequence[str],
    threads: int,
    rounds: int = 30,
    budget_s: float = 20.0,
    seed: int = 0,
) -> list[list[float]]:
    """Seconds of each run, per artifact; sample i of all artifacts comes from round i. Equal ones are loaded once.

    The order within a round is shuffled (seeded), the first two rounds are dropped. Stops after `rounds` rounds or when
    `budget_s` is used, but never before five.
    """
    engine = of_spec(runtime)
    loaded = {artifact: engine.load(Path(artifact), threads) for artifact in dict.fromkeys(artifacts)}
    runs = []
    for artifact, feed in zip(artifacts, feeds, strict=True):
        with np.load(feed, allow_pickle=False) as arrays:
            runs.append(stopwatch(loaded[artifact], {name: arrays[name] for name in arrays.files}))
    rng = np.random.default_rng(seed)
    samples: list[list[float]] = [[] for _ in runs]
    end_s = time.perf_counter() + budget_s
    for index in range(rounds + 2):
        for which in rng.permutation(len(runs)):
            seconds = runs[which]()
            if index >= 2:
                samples[which].append(seconds)
        if time.perf_counter() > end_s and index >= 6:
            break
    return samples
