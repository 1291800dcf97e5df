"""The demo's arrays, from a toy tokenizer and toy documents."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models import dataset
from models.dataset import SHORTEST, TOKENS, Sample, arrays, passages, unique
from models.text import UNLABELLED, Document


@pytest.fixture
def tokenizer_file(tmp_path):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(400))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def toy(monkeypatch):
    """Fewer documents than the real thing, all distinct."""
    rng = np.random.default_rng(0)

    def document(title, words, label=UNLABELLED):
        return Document(title, (" ".join(f"w{i}" for i in rng.integers(0, 400, words)),), label)

    monkeypatch.setattr(dataset, "LABELLED", {0: 6, 1: 5, 2: 10})
    monkeypatch.setattr(dataset, "PLAIN", {0: 15, 1: 9, 2: 30})
    news = [document(f"n{i}", 400, i % 5) for i in range(30)]
    monkeypatch.setattr(dataset, "news_articles", lambda: news)
    pages = [document(f"p{i}", 60) for i in range(60)]
    monkeypatch.setattr(dataset, "encyclopedia_pages", lambda count, rng: pages[:count])


def test_splits_have_their_sizes_and_share_no_document(toy, tokenizer_file):
    data = dataset.build(tokenizer_file, seed=1)
    labelled = data["labels"] >= 0
    assert [int((labelled & (data["split"] == s)).sum()) for s in range(3)] == [6, 5, 10]
    assert [int((~labelled & (data["split"] == s)).sum()) for s in range(3)] == [15, 9, 30]
    groups = [set(data["group"][data["split"] == s]) for s in range(3)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_rows_are_framed_padded_and_of_all_lengths(toy, tokenizer_file):
    data = dataset.build(tokenizer_file)
    lengths = data["attention_mask"].sum(1)
    rows = np.arange(len(lengths))
    assert data["input_ids"].shape[1] == TOKENS and data["input_ids"].dtype == np.int64
    assert (data["input_ids"][:, 0] == 2).all() and (data["input_ids"][rows, lengths - 1] == 3).all()
    assert not (data["input_ids"] * (1 - data["attention_mask"])).any() and not data["token_type_ids"].any()
    assert (lengths[data["labels"] >= 0] == TOKENS).all()
    assert len(np.unique(lengths)) > 10


def test_a_seed_gives_the_same_data_and_another_seed_other_data(toy, tokenizer_file):
    first, again, other = (dataset.build(tokenizer_file, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input_ids"], other["input_ids"])


def test_passages_follow_one_another_and_are_never_too_short():
    ids = list(range(1000))
    cut = passages(ids, np.random.default_rng(0))
    joined = [i for part in cut for i in part]
    assert joined == ids[: len(joined)] and len(ids) - len(joined) < SHORTEST
    assert min(map(len, cut[:-1])) >= SHORTEST and max(map(len, cut)) <= TOKENS - 2


def test_equal_token_ids_stay_once():
    samples = [Sample((1, 2), 0, 0, 0), Sample((1, 2), 1, 2, 1), Sample((3,), 0, 0, 2)]
    assert unique(samples) == [samples[0], samples[2]]
    assert arrays(unique(samples))["attention_mask"].sum() == 3
