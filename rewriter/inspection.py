"""`optimize inspect`: what a model consists of and what can be rewritten where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter.attention.inspect import describe
from rewriter.attention.recognise import recognise
from rewriter.core.passes_registry import discover
from rewriter.core.refusal import Refusal
from rewriter.core.site import Site
from rewriter.graph.onnx import load


def inspect(model: Path) -> dict[str, Any]:
    """Attentions, feed-forwards and what was not understood, with a verdict per rewrite. Raises `ModelError`."""
    graph = load(model)
    return describe(recognise(graph), graph, refusals)


def refusals(site: Site) -> Mapping[str, Refusal | None]:
    """For each pass: None if it may be applied at this site, or why not."""
    return {name: one.refuse(site) for name, one in discover().items()}
