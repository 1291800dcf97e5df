"""Put something without any mixing of tokens in an attention's place: a linear map, a bias, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.errors import OptionError
from rewriter.core.linalg import penalised, ridge_level, ridge_towards, solve_gram
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import RIDGE, Pass, attention_input, attention_refusal, out_of_range, output_weights
from rewriter.core.site import Array, AttentionSite, LinearSite, Projection, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, Regression, Statistics
from rewriter.core.target import Target

_WAYS = ("linear", "identity", "bias", "nothing")


@dataclass(frozen=True)
class AttentionReplacement(Pass):
    """Replace attention where a token's own content, or the mean alone, explains what it adds.

    What it does
        ``with=linear`` fits a linear map of the block's input to its output (with ``rank``, the best map of that
        rank); ``with=identity`` lets every token attend to itself alone, so that values go straight into the output
        projection; ``with=bias`` leaves the mean output; ``with=nothing`` leaves nothing. What has weights is fitted
        again on the rewritten model below.
    When it applies
        Self-attention whose queries, keys and values read one value, with weights known per head and values that are
        a bare projection, no cache, as many keys as queries, and a mask that is understood: one of unknown meaning
        can carry what no token-wise map knows.
    Exact or calibrated
        Calibrated; exact where tokens attend to themselves alone.
    What it costs
        One Gram of the block's input and one solve of its width: as much as a re-solve of the output projection.
    Before and after
        Four projections, scores and mixing -> one linear layer, or a vector added to every token.
    Source
        Bias and removal: He et al. 2024 (LLM-Drop); linear surrogate by least squares with reduced rank: Izenman 1975.
    """

    name: ClassVar[str] = "attention_replacement"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 50
    requires: ClassVar[frozenset[Detail]] = frozenset({"source"})
    combines: ClassVar[bool] = False

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        batch, queries, keys = site.example_shape
        if site.cross or (batch and queries != keys):
            return Refusal("cross-attention", "keys come from other tokens than queries, which no token-wise map sees")
        if len({_layout(part) for part in (site.query, site.key, site.value)}) > 1:
            return Refusal("several-sources", "queries, keys and values are projections of different values")
        if not site.value.plain:
            return Refusal("value-not-plain", "values pass a norm or a rotation after their projection")
        if site.mask == "opaque" and not site.bias.nothing:
            return Refusal("mask-not-understood", "the mask may decide the output, and a token-wise map has none")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """A full linear map, maps of half and a quarter of the rank, attending to oneself, a bias, nothing."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        width = _width(site)
        ranks = [rank for rank in (width // 2, width // 4) if rank >= 16 and rank % 8 == 0]
        maps = [Option(self.name, (("rank", rank), ("with", "linear")), site.id) for rank in ranks]
        full, *rest = (Option(self.name, (("with", way),), site.id) for way in _WAYS)
        return (full, *maps, *rest)

    def losses(self, site: Site, statistics: Statistics) -> Mapping[Option, float]:
        """See `Pass.losses`: of a full linear map, a bias and nothing."""
        if self.refuse(site) is not None or not isinstance(statistics, AttentionStatistics):
            return {}
        facts = statistics.regression
        found = {Option.of(self.name, site.id, **{"with": "bias"}): facts.spread}
        found[Option.of(self.name, site.id, **{"with": "nothing"})] = facts.energy
        if statistics.source is not None:
            fitted = statistics.source.loss(_fitted(statistics.source))
            found[Option.of(self.name, site.id, **{"with": "linear"})] = fitted
        return found

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """No features at all, where only a bias or nothing is left."""
        return np.zeros(0, np.intp) if _way(option) in ("bias", "nothing") else None

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        way = _way(option)
        if way == "nothing":
            return _constant(own, None)
        if way == "bias":
            return _constant(own, facts.regression.cross[-1] / max(facts.regression.tokens, 1))
        if way == "identity":
            return _identity(own, _source(facts, option))
        weights, width = _fitted(_source(facts, option)), _width(own)
        rank = option.integer("rank") if "rank" in dict(option.parameters) else width
        if not 1 <= rank <= width:
            raise out_of_range(option, "rank", 1, width)
        return _linear(own, weights) if rank == width else _narrow(own, weights, _source(facts, option), rank)


def _way(option: Option) -> str:
    way = dict(option.parameters).get("with")
    if way not in _WAYS:
        raise OptionError(f"{option} does not say what to put in the attention's place", f"with={', '.join(_WAYS)}")
    return str(way)


def _layout(part: Projection) -> tuple[str, bool, bool, bool]:
    return part.source, part.time_first, part.flatten, part.channels_first


def _width(site: AttentionSite) -> int:
    assert site.value.weight_CGD is not None
    return int(site.value.weight_CGD.shape[0])


def _fitted(source: Regression) -> Array64:
    """The least-squares map (C+1, C) of the block's input to its output, pulled towards zero."""
    return solve_gram(penalised(source.gram, ridge_level(source.gram, RIDGE)), source.cross)


def _source(facts: AttentionStatistics, option: Option) -> Regression:
    if facts.source is None:
        raise OptionError(f"{option} needs statistics of the block's input", "Give calibration data with --data")
    return facts.source


def _replaced(site: AttentionSite, inner: Projection, weight_HDC: Array64, bias_C: Array64 | None) -> LinearSite:
    assert site.output is not None
    dtype = site.output.weight_HDC.dtype
    bias = None if bias_C is None else bias_C.astype(dtype)
    output = replace(site.output, weight_HDC=weight_HDC.astype(dtype), bias_C=bias)
    return LinearSite(site.id, inner, output, site)


def _bare(site: AttentionSite, weight_CGD: Array | None = None, bias_GD: Array | None = None) -> Projection:
    return replace(site.value, weight_CGD=weight_CGD, bias_GD=bias_GD, head_of=(0,), weight_name="", bias_name="")


def _constant(site: AttentionSite, bias_C: Array64 | None) -> LinearSite:
    assert site.output is not None
    return _replaced(site, _bare(site), np.zeros((0, 0, site.output.weight_HDC.shape[2])), bias_C)


def _linear(site: AttentionSite, weights: Array64) -> LinearSite:
    """``source @ W + b``."""
    return _replaced(site, _bare(site), weights[None, :-1], weights[-1])


def _narrow(site: AttentionSite, weights: Array64, source: Regression, rank: int) -> LinearSite:
    """By way of the directions that hold most of what the map makes; the bias takes the mean of the others."""
    assert site.value.weight_CGD is not None
    mean = source.gram[-1, :-1] / max(source.tokens, 1)
    centred = source.gram[:-1, :-1] - source.tokens * np.outer(mean, mean)
    vectors = np.linalg.eigh(weights[:-1].T @ centred @ weights[:-1])[1]
    directions = vectors[:, ::-1][:, :rank]
    down = weights[:-1] @ directions
    bias = weights[-1] + mean @ (weights[:-1] - down @ directions.T)
    return _replaced(site, _bare(site, down[:, None].astype(site.value.weight_CGD.dtype)), directions.T[None], bias)


def _identity(site: AttentionSite, source: Regression) -> LinearSite:
    """Values straight into the output, which is fitted to them; folded where that makes it smaller."""
    assert site.value.weight_CGD is not None
    weights, width = _shared(site), _width(site)
    down_CF = site.value.weight_CGD.reshape(width, -1).astype(np.float64)
    fitted = ridge_towards(source.map(down_CF), weights, RIDGE)
    if 2 * down_CF.shape[1] >= width + weights.shape[1]:
        return _linear(site, np.vstack([down_CF @ fitted[:-1], fitted[-1:]]))
    inner = replace(site.value, bias_GD=None, head_of=tuple(range(site.value.heads)))
    return _replaced(site, inner, fitted[:-1].reshape(*site.value.weight_CGD.shape[1:], -1), fitted[-1])


def _shared(site: AttentionSite) -> Array64:
    """Output weights (G*D+1, C) for value heads read once: those of heads that share them added, their bias folded."""
    weights = output_weights(site)
    weight_HDC = weights[:-1].reshape(site.heads, site.v_dim, -1)
    shared = np.zeros((site.value.heads, *weight_HDC.shape[1:]))
    np.add.at(shared, list(site.value.head_of), weight_HDC)
    bias_GD = site.value.bias_GD
    carried = 0.0 if bias_GD is None else np.einsum("gd,gdn->n", bias_GD.astype(np.float64), shared)
    return np.vstack([shared.reshape(-1, weights.shape[1]), (weights[-1] + carried)[None]])
