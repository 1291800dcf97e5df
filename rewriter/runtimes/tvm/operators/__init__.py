"""The one table from operators to Relax: `TABLE` maps ``domain:op`` (or ``op``) to a function of (lowering, node)."""

from __future__ import annotations

from rewriter.runtimes.tvm.operators import (
    activations,
    composites,
    convolution,
    elementwise,
    fused_forms,
    linear,
    movement,
    normalisation,
    reductions,
    resizing,
    rotary,
    rotary_composite,
    standard_attention,
)
from rewriter.runtimes.tvm.operators.registry import TABLE

__all__ = [
    "TABLE",
    "activations",
    "composites",
    "convolution",
    "elementwise",
    "fused_forms",
    "linear",
    "movement",
    "normalisation",
    "reductions",
    "resizing",
    "rotary",
    "rotary_composite",
    "standard_attention",
]
