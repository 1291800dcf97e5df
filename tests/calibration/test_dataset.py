"""Datasets: batches, cropping, repeats, hashes."""

import subprocess
import sys

import numpy as np
import pytest

from rewriter.calibration.data import Dataset, cropping_is_harmless, run_all
from rewriter.core.errors import DataError

AXES = {"ids": ("batch", "sequence"), "mask": ("batch", "sequence"), "types": ("batch", "sequence")}
SAMPLES, TOKENS = 50, 16


def dataset(axes=AXES, seed=0, **annotations):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS - 3, SAMPLES)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    inputs = {"ids": rng.integers(2, 99, (SAMPLES, TOKENS)), "mask": mask, "types": np.zeros_like(mask)}
    return Dataset(inputs, axes=axes, **annotations), lengths


def mean_id(feeds):
    """A model that respects its mask."""
    return {"out": (feeds["ids"] * feeds["mask"]).sum(1, keepdims=True) / feeds["mask"].sum(1, keepdims=True)}


def test_lengths_come_from_the_mask_whatever_its_name():
    data, lengths = dataset()
    assert data.lengths().tolist() == lengths.tolist()


def test_token_types_alone_are_no_mask():
    data, _ = dataset()
    types = data.inputs["mask"][:, ::-1].copy()
    assert Dataset({"ids": data.inputs["ids"], "types": types}, axes=AXES).lengths() is None
    assert Dataset({"ids": data.inputs["ids"]}, axes=AXES).lengths() is None


def test_a_fixed_axis_is_never_cropped():
    fixed = dict.fromkeys(AXES, ("batch", TOKENS))
    data, _ = dataset(axes=fixed)
    assert {batch.feeds["ids"].shape[1] for batch in data.batches(8, crop=True)} == {TOKENS}


def test_every_sample_comes_once_with_similar_lengths_together():
    data, lengths = dataset()
    batches = list(data.batches(8, crop=True))
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(SAMPLES))
    for batch in batches:
        longest = lengths[batch.indices].max()
        assert all(array.shape == (len(batch.indices), longest) for array in batch.feeds.values())
        assert np.array_equal(batch.feeds["ids"], data.inputs["ids"][batch.indices, :longest])


def test_without_sorting_or_cropping_samples_stay_as_they_are():
    data, _ = dataset()
    first = next(data.batches(8, sort_by_length=False))
    assert first.indices.tolist() == list(range(8)) and np.array_equal(first.feeds["mask"], data.inputs["mask"][:8])


def test_positions_that_token_types_use_stay():
    data, _ = dataset()
    types = np.zeros_like(data.inputs["mask"])
    types[:, TOKENS - 2] = 1
    data = Dataset({**data.inputs, "types": types}, axes=AXES)
    assert {batch.feeds["ids"].shape[1] for batch in data.batches(8, crop=True)} == {TOKENS - 1}


def test_a_fixed_batch_size_is_kept_and_filled_up():
    data, _ = dataset(axes=dict.fromkeys(AXES, (8, "sequence")))
    batches = list(data.batches(32))
    assert {batch.feeds["ids"].shape[0] for batch in batches} == {8} and len(batches[-1].indices) == SAMPLES % 8
    assert np.array_equal(run_all(data, mean_id)["out"], mean_id(data.inputs)["out"])


def test_outputs_come_in_the_order_of_the_samples():
    data, _ = dataset()
    np.testing.assert_array_equal(run_all(data, mean_id, 7, crop=True)["out"], mean_id(data.inputs)["out"])


def test_outputs_without_a_sample_axis_are_refused():
    data, _ = dataset()
    with pytest.raises(DataError, match=r"output 'total' has shape \(\)"):
        run_all(data, lambda feeds: {"total": feeds["ids"].sum()})


def test_cropping_is_tried_not_assumed():
    data, _ = dataset()
    assert cropping_is_harmless(data, mean_id)
    assert not cropping_is_harmless(data, lambda feeds: {"out": feeds["ids"].mean(1, keepdims=True)})
    assert not cropping_is_harmless(data, lambda feeds: {"out": feeds["ids"] * feeds["mask"]})
    assert not cropping_is_harmless(Dataset({"ids": data.inputs["ids"]}, axes=AXES), mean_id)


def test_repeats_are_dropped_and_labelled_ones_kept():
    data, _ = dataset()
    rows = [0, 1, 0, 2, 1, 0]
    labels = np.array([-1, 3, 5, -1, 4, 6])
    once = Dataset(data.subset(rows).inputs, labels=labels, axes=AXES).deduplicate()
    assert np.array_equal(once.inputs["ids"], data.inputs["ids"][[1, 0, 2]])
    assert once.labels.tolist() == [3, 5, -1]
    assert data.deduplicate() is data


def test_subset_carries_annotations():
    data, _ = dataset(labels=np.arange(SAMPLES) - 1, group=np.arange(SAMPLES) // 2)
    part = data.subset([4, 0])
    assert part.labels.tolist() == [3, -1] and part.group.tolist() == [2, 0] and part.split is None
    assert len(data.labelled()) == SAMPLES - 1 and len(dataset()[0].labelled()) == 0


def test_the_hash_follows_content_alone():
    data, _ = dataset(labels=np.zeros(SAMPLES, dtype=np.int64))
    backwards = Dataset(dict(reversed(data.inputs.items())), labels=data.labels)
    assert data.content_hash() == backwards.content_hash()
    others = [
        dataset()[0],
        Dataset(data.inputs, split=data.labels),
        data.subset(range(SAMPLES)[::-1]),
        Dataset({**data.inputs, "ids": data.inputs["ids"].astype(np.int32)}, labels=data.labels),
    ]
    assert len({data.content_hash(), *(other.content_hash() for other in others)}) == 5


def test_the_hash_is_the_same_in_another_process():
    code = (
        "import numpy as np; from rewriter.calibration.dataset import Dataset;"
        "print(Dataset({'b': np.arange(6).reshape(3, 2), 'a': np.ones(3)}).content_hash())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = Dataset({"b": np.arange(6).reshape(3, 2), "a": np.ones(3)}).content_hash()
    assert done.stdout.strip() == here
