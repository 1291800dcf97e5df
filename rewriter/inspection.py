"""`optimize inspect`: what a model consists of and what can be rewritten where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.attention.inspect import describe
from rewriter.attention.recognise import recognise
from rewriter.core.passes_registry import discover
from rewriter.core.refusal import Refusal
from rewriter.core.site import Site
from rewriter.graph.onnx import load

if TYPE_CHECKING:
    from rewriter.torch_graphs.sites import TorchSites


def inspect(model: Path) -> dict[str, Any]:
    """Attentions, feed-forwards and what was not understood, with a verdict per rewrite. Raises `ModelError`."""
    graph = load(model)
    return describe(recognise(graph), graph, refusals)


def inspect_torch(sites: TorchSites) -> dict[str, Any]:
    """The same of a torch model, with the fx nodes and parameters behind every site."""
    return sites.describe(refusals)


# A pass for the other kind of site is no refusal worth reading.
WRONG_KIND = ("not-attention", "not-feed-forward")


def refusals(site: Site) -> Mapping[str, Refusal | None]:
    """For each pass made for this kind of site: None if it may be applied here, or why not."""
    verdicts = {name: one.refuse(site) for name, one in discover().items()}
    return {name: refusal for name, refusal in verdicts.items() if refusal is None or refusal.code not in WRONG_KIND}
