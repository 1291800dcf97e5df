"""MiniLM with its labelled task: news of five classes, by a probe that is fitted once to the original's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import minilm
from models.__main__ import build_minilm
from models.quality.checkpoint import Checkpoint, Feeds, Outputs, outputs
from rewriter.accuracy.metrics import Reference
from rewriter.accuracy.task import Accuracy
from rewriter.attention.recognise import recognise
from rewriter.calibration.data import Dataset, load_data
from rewriter.core.site import State
from rewriter.graph.onnx import load

CALIBRATE, SELECT, TEST = 0, 1, 2
_FIT, _CHOOSE, _SELECT, _BATCH = 440, 72, 160, 16


def sentences(folder: Path) -> Checkpoint:
    """all-MiniLM-L6-v2 at up to 128 tokens; calibrated on 512 samples without their labels."""
    if not (folder / "data.npz").exists():
        build_minilm(folder, 0)
    graph = load(folder / "minilm.onnx")
    data = load_data(folder / "data.npz", graph.inputs)
    split = np.load(folder / "data.npz")["split"]
    rng = np.random.default_rng(0)
    fit = rng.permutation(np.flatnonzero(split == CALIBRATE))[: _FIT + _CHOOSE]
    labelled, test = (_labelled(data, split == part) for part in (CALIBRATE, TEST))
    embedded = _joined(outputs(graph, _feeds(labelled)))
    assert labelled.labels is not None and test.labels is not None
    accuracy = Accuracy(Reference(embedded, _sorted_labels(labelled)))
    truth = _sorted_labels(test)
    by_batch = [batch.indices for batch in labelled.batches(_BATCH, crop=True)]
    return Checkpoint(
        "MiniLM", graph, [site for site in recognise(graph).sites if site.state is State.LOWERABLE], 128,
        _feeds(data.subset(fit[:_FIT])), _feeds(data.subset(fit[_FIT:])),
        _feeds(data.subset(rng.permutation(np.flatnonzero(split == SELECT))[:_SELECT])),
        _feeds(test), _feeds(labelled), _probe_loss(accuracy, labelled.labels, by_batch),
        lambda found: float(accuracy.values(_joined(found), _joined(found), truth, None)[1].mean()),
        _cosine_lost, "accuracy of the probe, %", "points",
    )  # fmt: skip


def _labelled(data: Dataset, rows: np.ndarray) -> Dataset:
    return data.subset(np.flatnonzero(rows)).labelled()


def _feeds(data: Dataset) -> list[Feeds]:
    return [batch.feeds for batch in data.batches(_BATCH, crop=True)]


def _sorted_labels(data: Dataset) -> np.ndarray:
    """Labels in the order of the batches, which are sorted by length."""
    assert data.labels is not None
    return np.concatenate([data.labels[batch.indices] for batch in data.batches(_BATCH, crop=True)])


def _joined(found: Sequence[Outputs]) -> dict[str, np.ndarray]:
    return {minilm.OUTPUT: np.concatenate([one[minilm.OUTPUT] for one in found])}


def _probe_loss(accuracy: Accuracy, labels: np.ndarray, rows: Sequence[np.ndarray]):  # type: ignore[no-untyped-def]
    """Cross-entropy of the probe on the model's embeddings: the task's loss, differentiable in the model."""
    weight, bias = (
        torch.tensor(part, dtype=torch.float32) for part in (accuracy.probe.coef_, accuracy.probe.intercept_)
    )

    def loss(found: Mapping[str, Tensor], batch: int) -> Tensor:
        scores = found[minilm.OUTPUT] @ weight.T + bias
        return torch.nn.functional.cross_entropy(scores, torch.tensor(labels[rows[batch]]))

    return loss


def _cosine_lost(original: Sequence[Outputs], new: Sequence[Outputs]) -> float:
    """One minus the mean cosine; embeddings have length one."""
    a, b = (_joined(found)[minilm.OUTPUT].astype(np.float64) for found in (original, new))
    return float(1.0 - (a * b).sum(-1).mean())
