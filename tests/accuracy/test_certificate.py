"""Verdicts: what is claimed, and what is not."""

import json

import numpy as np
import pytest

from rewriter.accuracy.certificate import certify, foresee, interval
from rewriter.accuracy.paired import Paired
from rewriter.core.errors import OptionError
from rewriter.core.options import MaxDrop


def right_or_wrong(n, lost, gained, right=0.9):
    original = np.zeros(n)
    original[: int(right * n)] = 1.0
    new = original.copy()
    new[:lost] = 0.0
    new[n - gained :] = 1.0
    return Paired("accuracy", "share", original, new)


def cosines(n, mean_loss, seed=0):
    values = 1.0 - np.random.default_rng(seed).gamma(2, mean_loss / 2, n)
    return Paired("cosine", "cosine", np.ones(n), values, ideal_original=True)


def test_enough_right_answers_are_certified():
    verdict = certify(right_or_wrong(5000, 40, 40), MaxDrop(0.01))
    assert verdict.certified and verdict.method == "exact unconditional score test" and verdict.n == 5000
    assert verdict.reason == "accuracy drop <= 1 points with 95 % confidence, n = 5,000"
    assert verdict.baseline == verdict.best == 0.9 and verdict.drop == 0.0
    assert verdict.drop_low < 0.0 < verdict.drop_high < 0.01


def test_too_few_items_are_said_with_the_number_needed():
    verdict = certify(right_or_wrong(400, 8, 8), MaxDrop(0.01))
    assert not verdict.certified
    assert verdict.reason == "not certifiable at this n (400): about 2,474 samples needed for accuracy drop <= 1 points"


def test_a_real_loss_is_not_blamed_on_n():
    verdict = certify(right_or_wrong(5000, 100, 10), MaxDrop(0.01))
    assert not verdict.certified and "measured drop of accuracy, 0.0180, is over the limit" in verdict.reason


def test_bounded_losses_get_the_betting_bound():
    verdict = certify(cosines(3000, 0.004), MaxDrop(0.01))
    assert verdict.certified and verdict.method == "betting bound"
    assert verdict.drop < verdict.bound < 0.01 and verdict.drop_low < verdict.drop < verdict.drop_high
    assert not certify(cosines(3000, 0.012), MaxDrop(0.01)).certified


def test_sorted_data_is_not_certified_on_its_harmless_beginning():
    losses = np.concatenate([np.zeros(3000), np.full(3000, 0.03)])
    paired = Paired("cosine", "cosine", np.ones(6000), 1.0 - losses, ideal_original=True)
    assert not certify(paired, MaxDrop(0.01)).certified


def test_samples_of_one_document_count_once():
    paired = cosines(3000, 0.004)
    verdict = certify(paired, MaxDrop(0.01), group=np.arange(3000) // 100)
    assert verdict.n == 30 and verdict.samples == 3000 and not verdict.certified


def test_relative_drops_are_relative():
    paired = right_or_wrong(20000, 80, 0, right=0.5)
    assert certify(paired, MaxDrop(0.01)).certified
    assert certify(paired, MaxDrop(0.012, relative=True)).method == "betting bound"
    assert not certify(paired, MaxDrop(0.005, relative=True)).certified
    assert certify(paired, MaxDrop(0.03, relative=True)).certified
    divergence = Paired("kl", "nats", np.zeros(50), np.zeros(50), higher_is_better=False, ideal_original=True)
    with pytest.raises(OptionError, match="relative --max-drop means nothing for kl"):
        certify(divergence, MaxDrop(0.01, relative=True))


def test_a_failed_output_is_the_worst_there_is():
    values = np.ones(2000)
    values[:60] = np.nan
    paired = Paired("cosine", "cosine", np.ones(2000), values, ideal_original=True)
    assert paired.drop == 0.03 and not certify(paired, MaxDrop(0.01)).certified
    divergence = Paired("kl", "nats", np.zeros(3), np.array([0, np.nan, np.inf]), higher_is_better=False)
    assert divergence.losses.tolist() == [0.0, 1.0, 1.0]


def test_no_confidence_left_certifies_nothing():
    verdict = certify(cosines(5000, 0.0), MaxDrop(0.01), confidence=0.0)
    assert not verdict.certified and "used too often" in verdict.reason


def test_verdicts_can_be_written_down():
    fields = json.loads(json.dumps(certify(right_or_wrong(400, 8, 8), MaxDrop(0.01)).as_dict()))
    assert {"metric", "baseline", "best", "drop", "max_drop", "certified", "confidence", "n"} <= set(fields)


def test_the_forecast_is_made_before_opening():
    good = foresee(cosines(500, 0.004), 4000, MaxDrop(0.01))
    assert good.worth_opening and good.power > 0.9 and good.needed is not None and good.needed < 4000
    few = foresee(cosines(500, 0.004), 100, MaxDrop(0.01))
    assert not few.worth_opening and few.sentence.startswith("not certifiable at this n (100): about ")
    bad = foresee(cosines(500, 0.02), 4000, MaxDrop(0.01))
    assert not bad.worth_opening and bad.needed is None
    labels = foresee(right_or_wrong(500, 8, 6), 5000, MaxDrop(0.01))
    assert 0.3 < labels.power < 0.9


def test_intervals_contain_the_drop():
    for paired in (cosines(300, 0.004), right_or_wrong(300, 5, 2)):
        low, high = interval(paired)
        assert low < paired.drop < high
        assert interval(paired) == (low, high)
