"""Operator implementations; importing this package registers all of them."""

from rewriter.graph.operators import (
    activations,
    attention,
    composite,
    control,
    convolution,
    elementwise,
    indexing,
    linear,
    microsoft,
    microsoft_attention,
    movement,
    normalisation,
    quantised,
    reductions,
    resize,
    shapes,
)

__all__ = [
    "activations",
    "attention",
    "composite",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "microsoft",
    "microsoft_attention",
    "movement",
    "normalisation",
    "quantised",
    "reductions",
    "resize",
    "shapes",
]
