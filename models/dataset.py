"""The demo's data: token ids of news and encyclopedia text, labelled and plain, in three splits that share no document.

Labelled samples are the first 128 tokens of an article. Plain samples are of every length from a line to 128 tokens:
later passages of the same articles (in the same split) and paragraphs of Wikipedia.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.text import UNLABELLED, Document, encyclopedia_pages, news_articles

TOKENS = 128
SHORTEST = 8
CALIBRATE, SELECT, CERTIFY = 0, 1, 2
LABELLED = {CALIBRATE: 600, SELECT: 500, CERTIFY: 1000}
PLAIN = {CALIBRATE: 1500, SELECT: 600, CERTIFY: 3000}
NEWS_SHARE = 1 / 3


@dataclass(frozen=True)
class Sample:
    """One row of the data before padding."""

    ids: tuple[int, ...]
    label: int
    split: int
    group: int


def build(tokenizer_file: Path, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """The arrays of ``data.npz``, all int64: three inputs (N, 128), `labels` (-1: none), `split` and `group` (N,).

    `split` is 0 to calibrate, 1 to select, 2 to certify; `group` is the document a sample comes from.
    """
    tokenizer = open_tokenizer(tokenizer_file)
    rng = np.random.default_rng(seed)
    articles = news_articles()
    order = rng.permutation(len(articles))
    samples: list[Sample] = []
    start = 0
    for split, count in LABELLED.items():
        chosen = {int(i): articles[i] for i in order[start : start + count]}
        samples += _news(tokenizer, chosen, split, int(PLAIN[split] * NEWS_SHARE), rng)
        start += count
    samples += _encyclopedia(tokenizer, len(articles), rng)
    return arrays(unique(samples))


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that neither pads nor truncates, whatever its file says."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def passages(ids: Sequence[int], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Token ids cut into consecutive passages whose lengths are log-uniform from 8 to 126."""
    cut, start = [], 0
    while len(ids) - start >= SHORTEST:
        length = round(float(np.exp(rng.uniform(np.log(SHORTEST), np.log(TOKENS - 2)))))
        cut.append(tuple(ids[start : start + length]))
        start += length
    return cut


def unique(samples: Sequence[Sample]) -> list[Sample]:
    """Samples without those whose token ids an earlier one has."""
    return list({sample.ids: sample for sample in reversed(samples)}.values())[::-1]


def arrays(samples: Sequence[Sample]) -> dict[str, NDArray[np.int64]]:
    """Samples padded with zeros to 128 tokens, under the names that the model and the optimizer expect."""
    ids_NS = np.zeros((len(samples), TOKENS), dtype=np.int64)
    mask_NS = np.zeros_like(ids_NS)
    for row, sample in enumerate(samples):
        ids_NS[row, : len(sample.ids)] = sample.ids
        mask_NS[row, : len(sample.ids)] = 1
    return {
        "input_ids": ids_NS,
        "attention_mask": mask_NS,
        "token_type_ids": np.zeros_like(ids_NS),
        "labels": np.array([sample.label for sample in samples], dtype=np.int64),
        "split": np.array([sample.split for sample in samples], dtype=np.int64),
        "group": np.array([sample.group for sample in samples], dtype=np.int64),
    }


def _news(
    tokenizer: Tokenizer, articles: Mapping[int, Document], split: int, plain: int, rng: np.random.Generator
) -> list[Sample]:
    labelled, later = [], []
    for group, article in articles.items():
        ids = tokenizer.encode(article.text, add_special_tokens=False).ids
        head, tail = tuple(ids[: TOKENS - 2]), ids[TOKENS - 2 :]
        labelled.append(Sample(_framed(tokenizer, head), article.label, split, group))
        later += [Sample(_framed(tokenizer, part), UNLABELLED, split, group) for part in passages(tail, rng)]
    chosen = rng.permutation(len(later))[:plain]
    return labelled + [later[int(i)] for i in chosen]


def _encyclopedia(tokenizer: Tokenizer, first_group: int, rng: np.random.Generator) -> list[Sample]:
    wanted = {split: count - int(count * NEWS_SHARE) for split, count in PLAIN.items()}
    pages = iter(enumerate(encyclopedia_pages(sum(wanted.values()), rng), first_group))
    samples: list[Sample] = []
    for split, count in wanted.items():
        rows: list[Sample] = []
        while len(rows) < count:
            group, page = next(pages)
            for encoded in tokenizer.encode_batch(list(page.paragraphs), add_special_tokens=False):
                rows.append(Sample(_framed(tokenizer, encoded.ids[: TOKENS - 2]), UNLABELLED, split, group))
        samples += rows[:count]
    return samples


def _framed(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, ...]:
    return (tokenizer.token_to_id("[CLS]"), *ids, tokenizer.token_to_id("[SEP]"))
