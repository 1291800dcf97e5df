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
    eye, values = tokens * np.eye(site.qk_dim), tokens * np.eye(site.value.heads * site.v_dim)
    queries = np.broadcast_to(eye, (site.heads, *eye.shape))
    return AttentionStatistics(
        queries.copy(),
        np.broadcast_to(eye, (site.key.heads, *eye.shape)).copy(),
        regression,
        source=None if site.query.weight_CGD is None else _blank_source(site, tokens),
        products_HDD=queries * tokens,
        joint_key=tokens * np.eye(site.key.heads * site.qk_dim),
        mixed_HKK=np.broadcast_to(values, (site.heads, *values.shape)),
        distance_HT=np.zeros((site.heads, 1)),
    )


def _blank_source(site: AttentionSite, tokens: int) -> Regression:
    assert site.query.weight_CGD is not None and site.output is not None
    columns, width = site.query.weight_CGD.shape[0] + 1, site.output.weight_HDC.shape[2]
    made = tokens * np.eye(columns, width)
    return Regression(tokens * np.eye(columns), made, float(made.sum()), tokens)
