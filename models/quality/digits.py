"""A vision transformer on scikit-learn's digits: accuracy on images it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import digits_vit
from models.quality.checkpoint import Checkpoint, Feeds, Outputs, reuse
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import load

_BATCH, _FIT, _CHOOSE, _SELECT = 64, 832, 128, 237


def digits(folder: Path) -> Checkpoint:
    """Four layers of width 64, trained here; calibrated on training images without their labels."""
    graph = load(reuse(folder / "digits.onnx", lambda partial: digits_vit.export(digits_vit.train(), partial)))
    (images, labels), (test, truth) = digits_vit.data()
    fit, choose, select = np.split(images[: _FIT + _CHOOSE + _SELECT], [_FIT, _FIT + _CHOOSE])
    found = recognise(graph)

    def loss(outputs: Mapping[str, Tensor], batch: int) -> Tensor:
        rows = slice(batch * _BATCH, (batch + 1) * _BATCH)
        return torch.nn.functional.cross_entropy(outputs[digits_vit.OUTPUT], torch.tensor(labels[:_FIT][rows]))

    return Checkpoint(
        "ViT on digits", graph, [site for site in found.sites if site.state is State.LOWERABLE],
        (digits_vit.SIDE // digits_vit.PATCH) ** 2, _feeds(fit), _feeds(choose), _feeds(select), _feeds(test),
        _feeds(fit), loss, lambda outputs: float((_scores(outputs).argmax(-1) == truth).mean()), _divergence,
        "accuracy, %", "points",
    )  # fmt: skip


def _feeds(images: np.ndarray) -> list[Feeds]:
    return [{digits_vit.INPUT: images[start : start + _BATCH]} for start in range(0, len(images), _BATCH)]


def _scores(outputs: Sequence[Outputs]) -> np.ndarray:
    return np.concatenate([one[digits_vit.OUTPUT] for one in outputs])


def _divergence(original: Sequence[Outputs], new: Sequence[Outputs]) -> float:
    """Mean KL of the new class distribution from the original's, in nats."""
    wanted, got = (torch.from_numpy(_scores(found)).double().log_softmax(-1) for found in (original, new))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())
