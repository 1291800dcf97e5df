"""The shape of a rewritten site without any data: latency does not depend on the values of weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewriter.core.rewrite import Pass, output_weights
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import AttentionStatistics, FeedForwardStatistics, Regression, Statistics
from rewriter.search.problem import Options


def restructure(site: Site, options: Options, passes: Mapping[str, Pass], blank: Statistics | None = None) -> Site:
    """The site after `options`, as if its activations were uncorrelated. `blank` is shared between calls for speed."""
    for index, option in enumerate(options):
        statistics = blank if index == 0 and blank is not None else blank_statistics(site)
        site = passes[option.name].apply(site, option, statistics)
    return site


def blank_statistics(site: Site) -> Statistics:
    """Statistics of uncorrelated activations of unit size, with the site's own output as the target."""
    weights = output_weights(site)
    tokens = 16 * weights.shape[0]
    gram = tokens * np.eye(weights.shape[0])
    cross = gram @ weights
    regression = Regression(gram, cross, float(np.sum(weights * cross)), tokens)
    if not isinstance(site, AttentionSite):
        return FeedForwardStatistics(regression)
    eye = tokens * np.eye(site.qk_dim)
    return AttentionStatistics(
        np.broadcast_to(eye, (site.heads, *eye.shape)).copy(),
        np.broadcast_to(eye, (site.key.heads, *eye.shape)).copy(),
        regression,
    )
