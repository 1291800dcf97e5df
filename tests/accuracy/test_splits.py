"""Splits share no document and no sample."""

import numpy as np
import pytest

from rewriter.accuracy.splits import split
from rewriter.calibration.data import Dataset
from rewriter.core.errors import DataError


def dataset(n=200, **annotations):
    return Dataset({"x": np.arange(n * 3).reshape(n, 3)}, **annotations)


def rows(part):
    return set(part.inputs["x"][:, 0].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_groups_never_straddle_splits(seed):
    group = np.random.default_rng(seed).integers(0, 40, 200)
    parts = split(dataset(group=group), seed)
    groups = [set(part.group) for part in (parts.calibrate, parts.select, parts.certify)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(len(part) for part in (parts.calibrate, parts.select, parts.certify)) == 200
    assert 70 <= len(parts.certify) <= 130


def test_repeats_are_dropped_before_splitting():
    data = dataset(100)
    twice = data.subset([*range(100), *range(100)])
    parts = split(twice)
    assert parts.repeats == 100
    taken = [rows(part) for part in (parts.calibrate, parts.select, parts.certify)]
    assert sum(map(len, taken)) == 100 == len(set.union(*taken))


def test_the_draw_depends_on_content_and_seed_alone():
    first, again, other = split(dataset(), 0), split(dataset(), 0), split(dataset(), 1)
    assert rows(first.certify) == rows(again.certify) != rows(other.certify)
    changed = Dataset({"x": dataset().inputs["x"] + 1})
    assert rows(first.certify) != {row - 1 for row in rows(split(changed, 0).certify)}


def test_a_given_split_is_honoured():
    given = np.arange(200) % 3
    parts = split(dataset(split=given))
    assert parts.given and rows(parts.select) == rows(dataset().subset(np.flatnonzero(given == 1)))


def test_a_given_split_may_not_cut_through_a_group():
    with pytest.raises(DataError, match="group 7 is in more than one split"):
        split(dataset(split=np.arange(200) % 3, group=np.where(np.arange(200) < 2, 7, np.arange(200) + 10)))


def test_an_empty_split_is_named():
    with pytest.raises(DataError, match="only 0 samples to certify"):
        split(dataset(split=np.arange(200) % 2))


def test_too_few_groups_are_not_enough():
    with pytest.raises(DataError, match="only 0 samples to"):
        split(dataset(group=np.zeros(200, dtype=np.int64)))
