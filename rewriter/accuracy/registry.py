"""All metrics by name."""

from __future__ import annotations

from rewriter.accuracy.fidelity import (
    Agreement,
    Cosine,
    KullbackLeibler,
    NearestNeighbours,
    RelativeError,
    Similarity,
)
from rewriter.accuracy.metrics import Metric
from rewriter.accuracy.task import Accuracy

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (Cosine, Similarity, NearestNeighbours, KullbackLeibler, Agreement, Accuracy, RelativeError)
}
