"""What requests will look like: how often which batch of how many tokens comes, from a file or from data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.core.errors import DataError

Size = tuple[int, int]  # batch, tokens

LARGEST = 1 << 20
_LARGEST_FILE_BYTES = 64 << 20
_FORM = 'Write {"lengths": {"17": 120, "23": 80}}, {"lengths": [17, 17, 23]} or {"requests": {"8x17": 120}}'


@dataclass(frozen=True)
class Requests:
    """How often each size of request comes: `counts` by (batch, tokens). `source` says where that was learnt.

    `room`: so many tokens must fit, whether or not any request counted here has them.
    """

    counts: Mapping[Size, int]
    source: str
    room: int = 0

    @property
    def total(self) -> int:
        """How many requests were counted."""
        return sum(self.counts.values())

    @property
    def longest(self) -> int:
        """The most tokens that must fit."""
        return max(self.room, *(tokens for _, tokens in self.counts))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that occur, rising."""
        return tuple(sorted({batch for batch, _ in self.counts}))

    @property
    def usual_batch(self) -> int:
        """The most frequent batch size."""
        often: Counter[int] = Counter()
        for (batch, _), count in self.counts.items():
            often[batch] += count
        return often.most_common(1)[0][0]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row of the mean request."""
        return sum(tokens * count for (_, tokens), count in self.counts.items()) / self.total

    def shares(self) -> dict[Size, float]:
        """The share of each size, sizes in rising order."""
        return {size: self.counts[size] / self.total for size in sorted(self.counts)}

    def quantile(self, share: float) -> int:
        """The fewest tokens that at least this share of the requests do not exceed."""
        done = 0
        for tokens, count in sorted(Counter(_tokens(self.counts)).items()):
            done += count
            if done >= share * self.total:
                return tokens
        return self.longest

    def sample(self, count: int, seed: int = 0) -> list[Size]:
        """A stratified sample in a random order: the middle of each of `count` equally likely parts of the sizes.

        Its mean differs from that of all requests by less than drawing at random would make it.
        """
        sizes, counts = zip(*sorted(self.counts.items()), strict=True)
        places = np.searchsorted(np.cumsum(counts), (np.arange(count) + 0.5) / count * self.total, side="left")
        order = np.random.default_rng(seed).permutation(count)
        return [sizes[int(places[index])] for index in order]

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], source: str, batch: int = 1) -> Requests:
        """From the tokens of each request, all of one batch size."""
        return cls(dict(Counter((batch, int(tokens)) for tokens in lengths)), source)

    @classmethod
    def load(cls, path: Path) -> Requests:
        """Read a file of ``--shape-histogram``; raises `DataError` for anything that is not of the documented form."""
        try:
            if path.stat().st_size > _LARGEST_FILE_BYTES:
                raise DataError(f"--shape-histogram {path} is larger than {_LARGEST_FILE_BYTES >> 20} MiB", _FORM)
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read --shape-histogram {path}: {error}", _FORM) from None
        return cls(_counted(content, path), str(path))


def _tokens(counts: Mapping[Size, int]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for (_, tokens), count in counts.items():
        found[tokens] += count
    return found


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise DataError(f"--shape-histogram {path} has {twice!r} twice", "Add the two counts up")
    return found


def _counted(content: Any, path: Path) -> dict[Size, int]:
    where = f"--shape-histogram {path}"
    if isinstance(content, list):
        content = {"lengths": content}
    if not isinstance(content, dict) or set(content) not in ({"lengths"}, {"requests"}):
        raise DataError(f"{where} is neither a list nor an object with 'lengths' or 'requests' alone", _FORM)
    ((kind, entries),) = content.items()
    if isinstance(entries, list):
        found = Counter(_size(entry, kind, where) for entry in entries)
    elif isinstance(entries, dict):
        found = Counter()
        for name, count in entries.items():
            found[_size(name, kind, where)] += _count(name, count, where)
    else:
        raise DataError(f"{where}: {kind!r} is neither a list nor an object", _FORM)
    kept = {size: count for size, count in found.items() if count}
    if not kept:
        raise DataError(f"{where} counts no request", _FORM)
    return kept


def _size(entry: Any, kind: str, where: str) -> Size:
    """``17`` or ``"17"`` among lengths, ``"8x17"`` among requests."""
    text = str(entry) if isinstance(entry, (int, str)) and not isinstance(entry, bool) else ""
    form = r"0*([0-9]{1,7})" if kind == "lengths" else r"0*([0-9]{1,7})x0*([0-9]{1,7})"
    match = re.fullmatch(form, text, re.ASCII)
    sizes = tuple(map(int, match.groups())) if match else ()
    if not sizes or not all(0 < size <= LARGEST for size in sizes):
        wanted = "a number of tokens" if kind == "lengths" else "of the form BATCHxTOKENS"
        raise DataError(f"{where}: {entry!r} is not {wanted} from 1 to {LARGEST}", _FORM)
    return (1, sizes[0]) if kind == "lengths" else (sizes[0], sizes[1])


def _count(name: str, count: Any, where: str) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 1 << 53:
        raise DataError(f"{where}: the count of {name!r} is {count!r}, not a whole number from 0 up", _FORM)
    return count
