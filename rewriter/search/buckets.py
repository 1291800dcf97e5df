"""Which few sizes to build for: those with the least expected time over the requests, as measured at some sizes.

Padded tokens are not what padding costs: time has a constant part, a part that grows with the square, and steps where
a kernel's tile is full. So the choice goes by seconds, measured at some sizes and interpolated between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from rewriter.core.lengths import Requests, Size

WORTH = 0.02  # what one more bucket must save of the expected time
MOST = 8  # buckets unless told: each costs compile time and code
_STEP = 8  # sizes between the longest of each layer are multiples of it, so that like requests fit tomorrow too
_CANDIDATES = 96
_BATCHES = 6


@dataclass(frozen=True)
class Buckets:
    """Sizes to build for, rising, and the mean seconds that a request is expected to take in them."""

    sizes: tuple[Size, ...]
    expected_s: float


class Curve:
    """Seconds by size: as measured at some sizes, in between linear in tokens, then in batch; constant beyond."""

    def __init__(self, measured_s: Mapping[Size, float]) -> None:
        if not measured_s:
            raise ValueError("a curve needs a measurement")
        self.measured_s = dict(measured_s)
        self._rows: dict[int, list[tuple[int, float]]] = {}
        for (batch, tokens), seconds in sorted(measured_s.items()):
            self._rows.setdefault(batch, []).append((tokens, seconds))

    def __call__(self, size: Size) -> float:
        """Seconds of one run at a size."""
        batch, tokens = size
        at = [float(np.interp(tokens, [t for t, _ in row], [s for _, s in row])) for row in self._rows.values()]
        return float(np.interp(batch, list(self._rows), at))


def candidates(requests: Requests) -> list[Size]:
    """Sizes worth building: for each batch, lengths at even steps up to the longest request."""
    return [(batch, tokens) for batch in _batches(requests) for tokens in _lengths(requests)]


def probes(requests: Requests, count: int) -> list[Size]:
    """About `count` of the candidates per batch whose times show the whole curve: both ends, and evenly by ratio."""
    lengths = _lengths(requests)
    wanted = np.geomspace(lengths[0], lengths[-1], max(2, count))
    near = sorted({min(lengths, key=lambda tokens: abs(tokens - goal)) for goal in wanted})
    return [(batch, tokens) for batch in _batches(requests) for tokens in near]


def choose(requests: Requests, seconds: Curve, count: int | None = None, most: int = MOST) -> Buckets:
    """The sizes with the least expected seconds; `count` of them, or as few as leave nothing worth another one.

    A request goes to the least batch that holds it, and there to the least length. Exact for that rule by dynamic
    programming: over batches, and below each over lengths. Fewer than `count` come back where fewer serve as well.
    """
    plan = _Plan(requests, seconds)
    if count is not None:
        return plan.best(count)
    found = plan.best(1)
    while len(found.sizes) < most:
        more = plan.best(len(found.sizes) + 1)
        if len(more.sizes) == len(found.sizes) or more.expected_s > (1.0 - WORTH) * found.expected_s:
            break
        found = more
    return found


def serving(sizes: Sequence[Size], request: Size) -> Size | None:
    """Of these sizes the smallest that holds a request, which is what artifacts choose; None if none does."""
    holding = [size for size in sizes if size[0] >= request[0] and size[1] >= request[1]]
    return min(holding, key=lambda size: (size[0] * size[1], size), default=None)


def expected_s(requests: Requests, sizes: Sequence[Size], seconds: Curve) -> float:
    """Mean seconds of a request in these sizes. Raises ValueError where one fits none of them."""
    total = 0.0
    for request, share in requests.shares().items():
        size = serving(sizes, request)
        if size is None:
            raise ValueError(f"no size holds {request}")
        total += share * seconds(size)
    return total


def _batches(requests: Requests) -> list[int]:
    """Batches to build for: all that occur, or the most frequent and the largest of many."""
    found = list(requests.batches)
    if len(found) <= _BATCHES:
        return found
    often = {batch: sum(count for (b, _), count in requests.counts.items() if b == batch) for batch in found}
    return sorted({found[-1], *sorted(found[:-1], key=lambda batch: -often[batch])[: _BATCHES - 1]})


def _lengths(requests: Requests) -> list[int]:
    longest, shortest = requests.longest, min(tokens for _, tokens in requests.counts)
    step = _STEP * max(1, -(-(longest - shortest) // (_STEP * _CANDIDATES)))
    return sorted({min(longest, -(-tokens // step) * step) for _, tokens in requests.counts} | {longest})


class _Plan:
    """The two dynamic programmes over one histogram."""

    def __init__(self, requests: Requests, seconds: Curve) -> None:
        self.batches, self.lengths = _batches(requests), _lengths(requests)
        self.seconds = seconds
        # weight[i, c]: the share of requests for which batch i is the least and length c the least.
        self.weight = np.zeros((len(self.batches), len(self.lengths)))
        for (batch, tokens), share in requests.shares().items():
            row = int(np.searchsorted(self.batches, batch))
            self.weight[row, int(np.searchsorted(self.lengths, tokens))] += share
        self._inner = cache(self._lengths_of)

    def best(self, count: int) -> Buckets:
        """At most `count` sizes."""
        last = len(self.batches)
        # reach[i][k]: the least cost of all requests of the first i batches in k sizes, and the sizes.
        reach: list[list[tuple[float, tuple[Size, ...]]]] = [
            [(np.inf, ()) for _ in range(count + 1)] for _ in range(last + 1)
        ]
        reach[0] = [(0.0, ()) for _ in range(count + 1)]
        for i in range(1, last + 1):
            for k in range(1, count + 1):
                for j in range(i):
                    for own in range(1, k + 1):
                        cost, lengths = self._inner(j, i, own)
                        total = reach[j][k - own][0] + cost
                        # A hair of doubt favours fewer sizes.
                        if total < reach[i][k][0] - 1e-15:
                            sizes = tuple((self.batches[i - 1], tokens) for tokens in lengths)
                            reach[i][k] = (total, reach[j][k - own][1] + sizes)
        cost, sizes = reach[last][count]
        return Buckets(tuple(sorted(sizes)), float(cost))

    def _lengths_of(self, j: int, i: int, count: int) -> tuple[float, tuple[int, ...]]:
        """Least cost of the requests of batches j to i in at most `count` lengths at batch i - 1, and the lengths."""
        weight = self.weight[j:i].sum(axis=0)
        used = np.flatnonzero(weight)
        if not used.size:
            return np.inf, ()
        # The largest batch keeps room for the longest, whether or not any request was that long.
        end = len(self.lengths) - 1 if i == len(self.batches) else int(used[-1])
        before = np.concatenate([[0.0], np.cumsum(weight)])
        took = np.array([self.seconds((self.batches[i - 1], tokens)) for tokens in self.lengths[: end + 1]])
        cost = before[1 : end + 2] * took
        chosen = [(c,) for c in range(end + 1)]
        for _ in range(count - 1):
            # through[p, c]: everything up to p as it was best, the rest up to c in length c.
            through = cost[:, None] + (before[1 : end + 2][None, :] - before[1 : end + 2][:, None]) * took[None, :]
            through[np.tril_indices(end + 1)] = np.inf
            first = np.argmin(through, axis=0)
            better = through[first, np.arange(end + 1)] < cost - 1e-15
            chosen = [chosen[first[c]] + (c,) if better[c] else chosen[c] for c in range(end + 1)]
            cost = np.where(better, through[first, np.arange(end + 1)], cost)
        return float(cost[end]), tuple(self.lengths[c] for c in chosen[end])
