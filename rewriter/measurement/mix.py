"""Speed over a distribution of lengths: one timed run is one pass over a sample of requests at their true lengths.

Engines with dynamic shapes get every request as it is; an artifact with buckets pads it itself, inside the time that
counts. All subjects get the same requests, so the ratio of two passes is the ratio of their mean times per request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rewriter.core.lengths import Requests
from rewriter.core.measurement import Interval, Measurement
from rewriter.measurement.bench import Subject, save_feeds
from rewriter.measurement.race import Rules

Feeds = Mapping[str, NDArray[Any]]

# One pass is many runs already, of which the first hardly weighs: a block is one pass, and nothing warms up before it.
RULES = Rules(
    least_rounds=8, most_rounds=60, budget_s=20.0, block_s=0.05, warm_rounds=0, warm_up_runs=0, reopen_every=6
)


def save_requests(
    requests: Requests, count: int, make: Callable[[int, int, int], Feeds], folder: Path, seed: int = 0
) -> tuple[Path, ...]:
    """Files of a stratified sample of `count` requests; ``make(batch, tokens, index)`` gives the inputs of one."""
    sample = requests.sample(count, seed)
    return save_feeds([make(batch, tokens, index) for index, (batch, tokens) in enumerate(sample)], folder)


def mix_subject(name: str, runtime: str, artifact: Path, requests: Sequence[Path]) -> Subject:
    """A subject whose single run is a pass over all requests, from arrays to arrays."""
    return Subject(name, runtime, artifact, tuple(requests), whole=True)


def per_request_s(measurement: Measurement, requests: int) -> Interval:
    """Mean seconds per request of the sample, from the times of whole passes."""
    whole = measurement.latency_s()
    return Interval(whole.median / requests, whole.low / requests, whole.high / requests, whole.samples)
