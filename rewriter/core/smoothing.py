"""Per-channel scaling between two linear layers of a sub-block: exact, and kinder to 8-bit rounding of the second.

``x_j W_j = (x_j / s_j) (s_j W_j)``: channels of large numbers widen the step with which a whole token is rounded,
unless they are divided by s_j where they are made, whose own weights are rounded per column and do not notice. Source:
Xiao et al. 2023 (SmoothQuant), there folded into the norm before a block, here into values and gates inside of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.core.rewrite import output_weights
from rewriter.core.site import Array, AttentionSite, FeedForwardSite, Site
from rewriter.core.statistics import Array64, Statistics

_STRENGTHS = (0.25, 0.5, 0.75)  # the exponent of a channel's magnitude; SmoothQuant's default is the middle one
_PEAK = 4.0  # largest of a token's channels, in standard deviations


def smoothed(site: Site, statistics: Statistics) -> Site:
    """The same function with the channels before the output projection scaled, if rounding to 8 bits gains by it."""
    groups = _tied(site)
    if groups is None:
        return site
    weights = output_weights(site)[:-1]
    power = np.maximum(np.diagonal(statistics.regression.gram)[:-1], 0.0) / max(statistics.regression.tokens, 1)
    best, least = None, _rounding(power, weights)
    for strength in _STRENGTHS:
        scale = _scale(power, weights, groups, strength)
        error = _rounding(power / scale**2, weights * scale[:, None])
        if error < least:
            best, least = scale, error
    return site if best is None else _scaled(site, best)


def _tied(site: Site) -> Array | None:
    """For every channel before the output projection which scale it has; None where scaling would not be exact."""
    if isinstance(site, AttentionSite):
        if not site.value.plain or site.output is None:
            return None
        return (np.array(site.value.head_of)[:, None] * site.v_dim + np.arange(site.v_dim)).reshape(-1)
    if isinstance(site, FeedForwardSite) and (site.gate_CF is not None or site.activation in ("relu", "identity")):
        return np.arange(site.width)
    return None


def _scale(power: Array64, weights: Array64, groups: Array, strength: float) -> Array64:
    """s of every channel, equal within a group, with a geometric mean of one."""
    count = int(groups.max()) + 1
    size, largest = np.zeros(count), np.zeros(count)
    np.maximum.at(size, groups, np.sqrt(power))
    np.maximum.at(largest, groups, np.abs(weights).max(axis=1))
    dead = (size <= 1e-9 * size.max()) | (largest <= 1e-9 * largest.max())
    size, largest = np.where(dead, 1.0, size), np.where(dead, 1.0, largest)
    scale = np.where(dead, 1.0, size**strength / largest ** (1.0 - strength))
    scale /= np.exp(np.mean(np.log(scale[~dead]))) if not dead.all() else 1.0
    return np.asarray(np.clip(scale, 1e-3, 1e3)[groups])


def _rounding(power: Array64, weights: Array64) -> float:
    """The expected squared error of 8-bit products: steps of tokens by their largest channel, of columns by theirs."""
    token = (2.0 * _PEAK * np.sqrt(power.max()) / 254.0) ** 2 / 12.0
    column = (np.abs(weights).max(axis=0) / 127.0) ** 2 / 12.0
    return float(token * np.sum(weights**2) + np.sum(power) * np.sum(column))


def _scaled(site: Site, scale: Array64) -> Site:
    if isinstance(site, FeedForwardSite):
        down = _times(site.down_FC, scale[:, None])
        if site.gate_CF is not None:
            gate, bias = _times(site.gate_CF, 1.0 / scale), site.gate_bias_F
            return replace(
                site, down_FC=down, gate_CF=gate, gate_bias_F=None if bias is None else _times(bias, 1.0 / scale)
            )
        up, bias = _times(site.up_CF, 1.0 / scale), site.up_bias_F
        return replace(site, down_FC=down, up_CF=up, up_bias_F=None if bias is None else _times(bias, 1.0 / scale))
    assert isinstance(site, AttentionSite) and site.output is not None and site.value.weight_CGD is not None
    scale_HD, scale_GD = scale.reshape(site.heads, site.v_dim), np.ones((site.value.heads, site.v_dim))
    scale_GD[list(site.value.head_of)] = scale_HD
    bias_GD = site.value.bias_GD
    value = replace(
        site.value,
        weight_CGD=_times(site.value.weight_CGD, 1.0 / scale_GD),
        bias_GD=None if bias_GD is None else _times(bias_GD, 1.0 / scale_GD),
    )
    output = replace(site.output, weight_HDC=_times(site.output.weight_HDC, scale_HD[:, :, None]))
    return replace(site, value=value, output=output)


def _times(array: Array, factor: Array64) -> Array:
    return np.asarray((array.astype(np.float64) * factor).astype(array.dtype))
