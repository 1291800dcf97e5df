"""Three splits that share no document: to calibrate, to select, and one opened once, to certify."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewriter.calibration.dataset import Dataset
from rewriter.core.errors import DataError

NAMES = ("calibrate", "select", "certify")
SHARES = (0.3, 0.2, 0.5)
FEWEST = 4


@dataclass(frozen=True)
class Splits:
    """`repeats` is how many samples were dropped because they occurred before."""

    calibrate: Dataset
    select: Dataset
    certify: Dataset
    repeats: int = 0
    given: bool = False


def split(data: Dataset, seed: int = 0) -> Splits:
    """Drop repeats, then take the data's own split or draw one, whole groups at a time.

    The draw depends on the content and the seed alone. About half of the samples go to certification, whose size
    decides what can be certified. Raises `DataError` when a given split is incomplete or cuts through a group, or
    when there are too few groups.
    """
    fresh = data.deduplicate()
    place = _drawn(fresh, seed) if fresh.split is None else _given(fresh)
    parts = [fresh.subset(np.flatnonzero(place == number)) for number in range(3)]
    for name, part in zip(NAMES, parts, strict=True):
        if len(part) < FEWEST:
            raise DataError(
                f"only {len(part)} samples to {name} after dropping {len(data) - len(fresh)} repeats",
                "Give more distinct samples, of more documents",
            )
    calibrate, select, certify = parts
    return Splits(calibrate, select, certify, len(data) - len(fresh), fresh.split is not None)


def _given(data: Dataset) -> NDArray[np.int64]:
    assert data.split is not None
    if data.group is not None:
        order = np.lexsort((data.split, data.group))
        group, place = data.group[order], data.split[order]
        torn = np.flatnonzero((group[1:] == group[:-1]) & (place[1:] != place[:-1]))
        if len(torn):
            raise DataError(
                f"group {int(group[torn[0]])} is in more than one split", "Put all samples of a group into one split"
            )
    return data.split


def _drawn(data: Dataset, seed: int) -> NDArray[np.int64]:
    group = data.group if data.group is not None else np.arange(len(data))
    digest = hashlib.sha256(f"{data.content_hash()} {seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    names, item, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(names))
    # A group belongs where its middle sample falls.
    middle = (np.cumsum(counts[order]) - counts[order] / 2.0) / len(data)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.searchsorted(np.cumsum(SHARES)[:2], middle)
    return np.asarray(place[item])
