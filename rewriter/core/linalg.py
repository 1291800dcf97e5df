"""Small linear algebra shared by the passes and by assembly, all in float64."""

from __future__ import annotations

import numpy as np
from scipy import linalg

from rewriter.core.statistics import Array64, Regression


def cholesky_upper(gram: Array64, ridge: float = 1e-6) -> Array64:
    """Upper R with ``R.T @ R = gram + ridge * mean(diag) * I``.

    Falls back to an eigendecomposition that lifts eigenvalues to 1e-10 of the largest (dead channels, duplicates).
    """
    size = gram.shape[0]
    symmetric = (gram + gram.T) / 2.0
    level = ridge * float(np.trace(symmetric)) / size
    try:
        return np.asarray(linalg.cholesky(symmetric + level * np.eye(size), lower=False))
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(symmetric)
        lifted = np.maximum(values, 1e-10 * max(float(values[-1]), 1e-300))
        return np.asarray(linalg.qr((vectors * np.sqrt(lifted)).T, mode="r")[0])


def solve_gram(gram: Array64, right: Array64) -> Array64:
    """``gram^-1 @ right`` for a symmetric positive (semi)definite Gram matrix."""
    try:
        return np.asarray(linalg.solve(gram, right, assume_a="pos"))
    except linalg.LinAlgError:
        return np.asarray(linalg.lstsq(gram, right)[0])


def ridge_level(gram: Array64, ridge: float) -> float:
    """The absolute penalty lambda of a relative `ridge`: times the mean diagonal of `gram` without its ones-column."""
    features = gram.shape[0] - 1
    return 0.0 if features == 0 else ridge * float(np.trace(gram[:features, :features])) / features


def penalised(gram: Array64, level: float) -> Array64:
    """``gram + level * I`` except for the ones-column, which comes last and stays free."""
    return gram + np.diag(np.append(np.full(gram.shape[0] - 1, level), 0.0))


def ridge_towards(regression: Regression, current: Array64, ridge: float, level: float | None = None) -> Array64:
    """Least squares pulled towards the current weights: ``W + (G + lambda I)^-1 (C - G W)``.

    `current` is (F+1, C) with the bias in its last row; lambda is ``ridge * trace(G) / columns``, or `level` if given,
    and does not act on the bias row. ridge -> infinity returns `current`, ridge -> 0 the least-squares solution.
    """
    gram = regression.gram
    if gram.shape[0] == 1:
        return np.asarray(regression.cross / max(float(gram[0, 0]), 1.0))
    level = ridge_level(gram, ridge) if level is None else level
    return np.asarray(current + solve_gram(penalised(gram, level), regression.cross - gram @ current))
