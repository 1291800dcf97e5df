"""Names for what is added to the scores, by its numbers: padding, causal, window, additive. For people and reports."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rewriter.core.site import Array

Mask = Literal["none", "padding", "causal", "window", "additive", "opaque"]
HARD = 1e3  # below the row's largest term by this much: exp is exactly 0 in float32 at ordinary logits


def classify(offset_BHST: Array) -> tuple[Mask, bool, bool]:
    """(mask, causal, whether a finite term remains) of the additive part of the scores.

    The structure is read from the batch item with most allowed keys, so that padding of other items does not hide it.
    """
    if not offset_BHST.any():
        return "none", False, False
    finite = np.where(np.isfinite(offset_BHST), offset_BHST, -np.inf)
    top = finite.max(-1, keepdims=True)
    allowed = finite >= np.where(np.isfinite(top), top, 0.0) - HARD
    soft = _varies(finite, top, allowed)
    widest = int(np.argmax(allowed.sum((1, 2, 3))))
    structure = allowed[widest, 0]
    if not (allowed[widest] == structure).all():
        return "opaque", False, soft
    queries, keys = structure.shape
    distance = np.arange(queries)[:, None] + (keys - queries) - np.arange(keys)
    if structure.all():
        padded = not allowed.all()
        return ("padding" if padded else "additive" if soft else "none"), False, soft
    causal = bool((structure == (distance >= 0)).all())
    if causal:
        return "causal", True, soft
    reach = int(np.abs(distance[structure]).max()) if structure.any() else 0
    if (structure == (np.abs(distance) <= reach)).all():
        return "window", False, soft
    if (structure == ((distance >= 0) & (distance <= reach))).all():
        return "window", True, soft
    return "opaque", False, soft


def _varies(finite: Array, top: Array, allowed: Array) -> bool:
    """Whether what is added to the scores of a query tells its keys apart, where it hides none of them."""
    known = np.where(np.isfinite(top), top, 0.0)
    below = np.where(allowed, known - np.where(allowed, finite, known), 0.0)
    return bool((below > 1e-9 + 4 * np.spacing(np.abs(known))).any())
