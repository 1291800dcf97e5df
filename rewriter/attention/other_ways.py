"""Other ways to tell what a site does to rows without any key to attend to, tried where the first is not the identity.

Such rows are where masks show what they are: added to the content, put in its place, or applied after the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rewriter.core.site import AttentionSite, RaisedSite

Change = Callable[[RaisedSite], RaisedSite]


def unchanged(site: RaisedSite) -> RaisedSite:
    """The site as it is."""
    return site


def other_ways(site: RaisedSite) -> Iterator[Change]:
    """Changes to try, simplest first."""
    if not isinstance(site, AttentionSite) or (site.bias.nothing and not site.names.get("scores")):
        return
    if site.bias.logarithm:
        yield _other_empty_rows
    elif site.names.get("scores") and not site.bias.lead:
        yield _with_scores_replaced


def _other_empty_rows(site: RaisedSite) -> RaisedSite:
    assert isinstance(site, AttentionSite)
    return replace(site, empty_rows="zero" if site.empty_rows == "nan" else "nan")


def _with_scores_replaced(site: RaisedSite) -> RaisedSite:
    """The content counts only where the scores move with it."""
    assert isinstance(site, AttentionSite)
    product, scores = site.names["product"], site.names["scores"]
    bias = site.bias
    if bias.kind == "fill":  # the number itself, not one that swallows the content
        bias = replace(bias, kind="path", value=product, path_end=scores, full_shape=True, heads_axis=site.heads)
    return replace(site, bias=replace(bias, kept=(product, scores)))
