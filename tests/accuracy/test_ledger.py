"""The ledger: what a second look at a certification split costs."""

import json
import multiprocessing

import pytest

from rewriter.accuracy.ledger import MOST_OPENINGS, Ledger


def test_the_first_look_is_free_and_each_further_one_halves_delta(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    looks = [ledger.open("data", subject) for subject in ("a", "b", "c")]
    assert [look.ordinal for look in looks] == [1, 2, 3]
    assert [look.confidence for look in looks] == pytest.approx([0.95, 0.975, 0.9875])
    assert "for the first time" in looks[0].sentence
    assert "opened 2 times before: this look is tested at 98.75" in looks[2].sentence


def test_the_same_candidate_looks_again_for_nothing(tmp_path):
    for subject in ("a", "b", "a", "b"):
        Ledger(tmp_path).open("data", subject)
    assert Ledger(tmp_path).open("data", "a").ordinal == 1
    assert Ledger(tmp_path).open("data", "c").ordinal == 3


def test_other_data_has_an_account_of_its_own(tmp_path):
    Ledger(tmp_path).open("data", "a")
    assert Ledger(tmp_path).open("other", "b").ordinal == 1


def test_looking_ahead_records_nothing(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.foresee("data", "a").ordinal == 1
    ledger.open("data", "a")
    assert [ledger.foresee("data", subject).ordinal for subject in ("a", "b", "c")] == [1, 2, 2]


def test_a_used_up_split_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    looks = [ledger.open("data", str(i)) for i in range(MOST_OPENINGS + 1)]
    assert not looks[-2].refused and looks[-1].refused and looks[-1].confidence == 0.0
    assert "certifies nothing any more" in looks[-1].sentence


def test_a_torn_line_counts_as_a_look(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"subject": "a"}) + '\n{"subj')
    ledger = Ledger(tmp_path)
    assert ledger.open("data", "b").ordinal == 3
    assert ledger.open("data", "a").ordinal == 1
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n[]\n")
    assert ledger.open("data", "c").ordinal == 6


def look(folder, subject):
    Ledger(folder).open("data", subject)


def test_processes_that_look_at_once_are_all_recorded(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=look, args=(tmp_path, f"subject {i}")) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    subjects = [json.loads(line)["subject"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert sorted(subjects) == [f"subject {i}" for i in range(4)]
