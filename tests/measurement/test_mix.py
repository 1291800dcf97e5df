"""Races over a distribution of lengths, with real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rewriter.core.lengths import Requests
from rewriter.measurement.bench import load_feeds
from rewriter.measurement.mix import mix_subject, per_request_s, save_requests
from rewriter.measurement.race import Rules, race

FAKE = "tests.measurement.fake_runtime:FakeRuntime"


def make(batch: int, tokens: int, index: int) -> dict[str, np.ndarray]:
    return {"x": np.full((batch, tokens), index, np.int64)}


def test_requests_are_saved_at_their_true_lengths(tmp_path: Path) -> None:
    requests = Requests({(1, 3): 3, (2, 9): 1}, "here")
    paths = save_requests(requests, 4, make, tmp_path)
    shapes = [load_feeds(path)["x"].shape for path in paths]
    assert sorted(shapes) == [(1, 3)] * 3 + [(2, 9)] and [load_feeds(p)["x"][0, 0] for p in paths] == [0, 1, 2, 3]


def test_a_run_is_one_pass_over_all_requests(tmp_path: Path) -> None:
    paths = save_requests(Requests({(1, 3): 3, (2, 9): 1}, "here"), 4, make, tmp_path / "feeds")
    subjects = []
    for name in ("fast", "slow"):
        (tmp_path / name).write_text(name)
        subjects.append(mix_subject(name, FAKE, tmp_path / name, paths))
    found = race(subjects, rules=Rules(least_rounds=6, most_rounds=6, block_s=1e-4, warm_rounds=0, warm_up_runs=0))
    shapes = (tmp_path / "slow.runs").read_text().split()
    assert sorted(shapes[:4]) == ["1x3", "1x3", "1x3", "2x9"]
    # Opening runs a pass, then come three to see how long one takes, then the race.
    assert shapes == shapes[:4] * (1 + 3 + 6)
    assert len(found["slow"].blocks_s) == 6
    # A slow run sleeps 2 ms per token.
    each = per_request_s(found["slow"], 4)
    assert each.median >= 0.002 * (3 * 3 + 9) / 4
