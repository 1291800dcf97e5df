"""Accuracy on labels, of the model's own scores or of a probe on its frozen embeddings."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.metrics import Array, Metric, Outputs, Reference, says_logits
from rewriter.accuracy.paired import Values
from rewriter.core.errors import DataError


class Accuracy(Metric):
    """Share of labelled samples that are classified right.

    An output with a column per class is taken as scores. Any other is an embedding: a logistic regression is
    fitted once, to the original's embeddings of the labelled calibration samples, and then judges both models, so a
    rewrite has to keep the directions that carry the labels (linear probes: Alain and Bengio 2016).
    """

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share"
    meaning: ClassVar[str] = "share of labelled samples classified right"
    ideal_original: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        labels = reference.labels
        if labels is None or not (labels >= 0).any():
            raise DataError("accuracy needs labelled calibration samples", "Give the data an array 'labels'")
        known = labels >= 0
        rows = self._rows(reference.outputs)[known]
        classes = np.unique(labels[known])
        scores = rows.ndim == 2 and self._are_scores(rows, classes)
        self.probe = None if scores else _fit_probe(rows, labels[known])

    def values(
        self, original: Outputs, new: Outputs, labels: NDArray[np.int64] | None, mask: Array | None
    ) -> tuple[Values, Values]:
        """(N,) ones and zeros, right and wrong. Every sample must have a label."""
        if labels is None or (labels < 0).any():
            raise DataError("accuracy was asked of samples without labels", "Score the labelled samples only")
        return self._right(original, labels), self._right(new, labels)

    def _are_scores(self, rows: Array, classes: Array) -> bool:
        """Whether columns are classes: no label beyond them, and few more columns than labels met or a telling name."""
        columns = rows.shape[1]
        return bool(classes.max() < columns and (columns <= 2 * len(classes) or says_logits(self.output)))

    def _right(self, outputs: Outputs, labels: NDArray[np.int64]) -> Values:
        rows = self._rows(outputs)
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        rows = np.where(np.isfinite(rows), rows, 0.0)
        predicted = rows.argmax(-1) if self.probe is None else self.probe.predict(_flat(rows))
        return np.asarray((predicted == labels) & finite, dtype=np.float64)


def _fit_probe(rows: Array, labels: Array):  # type: ignore[no-untyped-def]  # scikit-learn ships no types
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise DataError("the labelled calibration samples are all of one class", "Give samples of each class")
    return LogisticRegression(C=10.0, max_iter=2000).fit(_flat(rows), labels)


def _flat(rows: Array) -> Array:
    return rows.reshape(len(rows), -1)
