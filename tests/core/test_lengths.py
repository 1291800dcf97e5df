"""Histograms of request sizes: every documented form, every malformed kind, and samples that stand for the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.core.errors import DataError
from rewriter.core.lengths import Requests


@pytest.mark.parametrize(
    ("content", "counts"),
    [
        ({"lengths": {"17": 2, "23": 1}}, {(1, 17): 2, (1, 23): 1}),
        ({"lengths": [17, 23, 17]}, {(1, 17): 2, (1, 23): 1}),
        ([17, 23, 17], {(1, 17): 2, (1, 23): 1}),
        ({"requests": {"8x17": 3, "1x17": 1}}, {(8, 17): 3, (1, 17): 1}),
        ({"requests": ["8x17"]}, {(8, 17): 1}),
        ({"lengths": {"17": 2, "5": 0, "0017": 1}}, {(1, 17): 3}),
    ],
)
def test_forms(tmp_path: Path, content: object, counts: dict[tuple[int, int], int]) -> None:
    (tmp_path / "lengths.json").write_text(json.dumps(content))
    assert dict(Requests.load(tmp_path / "lengths.json").counts) == counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot read"),
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("\xff", "neither a list"),
        ("17", "neither a list"),
        ("null", "neither a list"),
        ('{"lengths": {"17": 1}, "more": 2}', "neither a list"),
        ('{"lengths": {"17": 1}, "requests": {}}', "neither a list"),
        ('{"lengths": 17}', "'lengths' is neither"),
        ('{"lengths": {}}', "counts no request"),
        ("[]", "counts no request"),
        ('{"lengths": {"17": 0}}', "counts no request"),
        ('{"lengths": {"17": 1, "17": 2}}', "'17' twice"),
        ('{"lengths": {"17": -1}}', "count of '17' is -1"),
        ('{"lengths": {"17": 1.5}}', "count of '17' is 1.5"),
        ('{"lengths": {"17": true}}', "count of '17' is True"),
        ('{"lengths": {"17": NaN}}', "count of '17' is nan"),
        ('{"lengths": {"17": 1e400}}', "count of '17' is inf"),
        ('{"lengths": {"long": 1}}', "'long' is not a number of tokens"),
        ('{"lengths": {"0": 1}}', "'0' is not a number of tokens"),
        ('{"lengths": {"-3": 1}}', "'-3' is not a number of tokens"),
        ('{"lengths": {"99999999": 1}}', "'99999999' is not"),
        ('{"lengths": {"١٧": 1}}', "is not a number of tokens"),
        ("[17, 2.5]", "2.5 is not a number of tokens"),
        ("[17, true]", "True is not a number of tokens"),
        ("[17, [3]]", "[3] is not a number of tokens"),
        ('{"requests": {"17": 1}}', "'17' is not of the form BATCHxTOKENS"),
        ('{"requests": {"0x17": 1}}', "'0x17' is not of the form"),
    ],
)
def test_what_is_malformed_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lengths.json").write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
    wanted = "cannot read" if text == "\xff" else said
    with pytest.raises(DataError) as caught:
        Requests.load(tmp_path / "lengths.json")
    assert wanted in str(caught.value) and "lengths.json" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        Requests.load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="cannot read"):
        Requests.load(tmp_path)


def test_facts() -> None:
    found = Requests({(1, 10): 3, (2, 30): 1}, "here")
    assert (found.total, found.longest, found.batches, found.mean_tokens) == (4, 30, (1, 2), 15.0)
    assert found.shares() == {(1, 10): 0.75, (2, 30): 0.25}
    assert (found.quantile(0.5), found.quantile(0.75), found.quantile(0.76)) == (10, 10, 30)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 40), st.integers(0, 3))
def test_a_sample_stands_for_the_whole(lengths: list[int], count: int, seed: int) -> None:
    requests = Requests.of_lengths(lengths, "here")
    sample = requests.sample(count, seed)
    assert len(sample) == count and set(sample) <= set(requests.counts)
    assert sorted(sample) == sorted(requests.sample(count, seed + 1))
    # No share of the sample differs from that of all by more than one part.
    for limit in set(lengths):
        drawn, true = np.mean([t <= limit for _, t in sample]), np.mean([t <= limit for t in lengths])
        assert abs(drawn - true) <= 0.5 / count + 1e-9
