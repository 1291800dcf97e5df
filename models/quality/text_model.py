"""SmolLM2-135M: perplexity of encyclopedia text in windows of 256 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import smollm2, text
from models.quality.checkpoint import Checkpoint, Feeds, Outputs, reuse
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import load

_WINDOW, _BATCH = 256, 2
_WINDOWS = {"calibrate": 96, "choose": 16, "select": 8, "test": 32}


def text_model(folder: Path) -> Checkpoint:
    """The decoder without a cache: prefill, as it is scored. Its own labels are the next tokens."""
    model, tokenizer = smollm2.load()
    graph = load(reuse(folder / "smollm2.onnx", lambda partial: smollm2.export(model, partial)))
    parts = _windows(tokenizer)
    found = recognise(graph, {smollm2.INPUT: next(iter(parts["test"]))[smollm2.INPUT]})
    return Checkpoint(
        "SmolLM2-135M", graph, [site for site in found.sites if site.state is State.LOWERABLE], _WINDOW,
        parts["calibrate"], parts["choose"], parts["select"], parts["test"], parts["calibrate"][:24],
        lambda outputs, batch: _loss(outputs[smollm2.OUTPUT], parts["calibrate"][batch]),
        lambda outputs: _perplexity(outputs, parts["test"]), _divergence, "perplexity", "%", lower_is_better=True,
    )  # fmt: skip


def _windows(tokenizer: object) -> dict[str, list[Feeds]]:
    """Consecutive windows of pages in a random order; no page is in two parts."""
    pages = iter(text.encyclopedia_pages(6000, np.random.default_rng(0)))
    parts: dict[str, list[Feeds]] = {}
    for name, count in _WINDOWS.items():
        ids: list[int] = []
        while len(ids) < count * _WINDOW:
            ids += tokenizer.encode(next(pages).text + "\n\n").ids  # type: ignore[attr-defined]
        rows = np.array(ids[: count * _WINDOW], np.int64).reshape(-1, _BATCH, _WINDOW)
        parts[name] = [{smollm2.INPUT: batch} for batch in rows]
    return parts


def _loss(logits_BSV: Tensor, feeds: Feeds) -> Tensor:
    next_BS = torch.tensor(feeds[smollm2.INPUT][:, 1:])
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), next_BS.flatten())


def _perplexity(outputs: Sequence[Outputs], batches: Sequence[Feeds]) -> float:
    losses = [
        float(_loss(torch.from_numpy(np.asarray(one[smollm2.OUTPUT])), feeds))
        for one, feeds in zip(outputs, batches, strict=True)
    ]
    return float(np.exp(np.mean(losses)))


def _divergence(original: Sequence[Outputs], new: Sequence[Outputs]) -> float:
    """Mean KL of the new next-token distribution from the original's, in nats."""
    found = []
    for a, b in zip(original, new, strict=True):
        wanted, got = (torch.from_numpy(np.asarray(one[smollm2.OUTPUT])).log_softmax(-1) for one in (a, b))
        found.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    return float(np.mean(found))
