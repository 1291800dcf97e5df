"""From the values of a lowered graph to rows of tokens: where a site's inner values are, and which tokens count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.calibration.statistics import (
    HeadGramAccumulator,
    RegressionAccumulator,
    StreamRegression,
    centred,
    valid_keys,
)
from rewriter.core.rewrite import output_weights
from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.core.statistics import Array64, AttentionStatistics, FeedForwardStatistics, Statistics
from rewriter.graph.composites import is_composite
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Stepper


@dataclass(frozen=True)
class Ports:
    """Names of an attention's inner values in a lowered graph, as they enter its `Attention` composite."""

    query: str
    key: str
    bias: str
    query_heads: int
    key_heads: int


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Everything known of one site on one stream; `queries` and `keys` are None for feed-forwards."""

    regression: StreamRegression
    query_HDD: Array64 | None = None
    key_GDD: Array64 | None = None

    def at(self, alpha: float) -> Statistics:
        """What a pass is given, with the target ``output + alpha * residual``."""
        regression = self.regression.target(alpha)
        if self.query_HDD is None or self.key_GDD is None:
            return FeedForwardStatistics(regression)
        return AttentionStatistics(self.query_HDD, self.key_GDD, regression)


def feature_name(site: Site) -> str:
    """The input of the site's output projection, as lowering names it."""
    return f"{site.id}/hidden" if isinstance(site, FeedForwardSite) else f"{site.id}/features"


def output_name(site: Site) -> str:
    """The site's result in the graph."""
    if isinstance(site, FeedForwardSite):
        return site.output
    assert site.output is not None
    return site.output.value


def ports(lowered: OnnxGraph, site: AttentionSite) -> Ports:
    """The inputs of the site's `Attention` composite."""
    node = lowered.value(feature_name(site)).producer()
    assert node is not None and is_composite(node, "Attention")
    names = [_name(value) for value in node.inputs]
    return Ports(
        names[0],
        names[1],
        names[3] if len(names) > 3 else "",
        node.attributes["query_heads"].as_int(),
        node.attributes["key_heads"].as_int(),
    )


def inner_names(lowered: OnnxGraph, site: Site) -> set[str]:
    """Everything a walk asks of a site: its output and features, an attention's queries, keys and bias."""
    names = {output_name(site), feature_name(site)}
    if isinstance(site, AttentionSite):
        own = ports(lowered, site)
        names |= {own.query, own.key, *([own.bias] if own.bias else [])}
    return names


class Tokens:
    """Which tokens count, batch by batch: learnt from the masks of the attentions as a walk passes them.

    A feed-forward and a cross-attention's queries take the mask of the nearest self-attention below with as many
    sequences and tokens; without one all tokens count. `share` keeps a seeded part of the tokens only.
    """

    def __init__(self, share: float = 1.0, seed: int = 0) -> None:
        self._valid: dict[int, list[Tensor]] = {}
        self._share, self._seed = share, seed

    def learn(self, batch: int, valid_BS: Tensor) -> None:
        """Remember the valid tokens of a self-attention."""
        same = [valid for valid in self._valid.get(batch, []) if valid.shape != valid_BS.shape]
        self._valid[batch] = [*same, valid_BS]

    def of(self, batch: int, lead: tuple[int, ...]) -> Tensor:
        """Valid tokens for rows with these leading axes, (B, S), (S, B) or (B * S,), flattened."""
        for valid in reversed(self._valid.get(batch, [])):
            if lead in (tuple(valid.shape), (valid.numel(),)):
                return self._sampled(batch, valid.reshape(-1))
            if lead == tuple(valid.T.shape):
                return self._sampled(batch, valid.T.reshape(-1))
        return self._sampled(batch, torch.ones(int(np.prod(lead)), dtype=torch.bool))

    def _sampled(self, batch: int, valid: Tensor) -> Tensor:
        if self._share >= 1.0:
            return valid
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + batch)
        return valid & (torch.rand(valid.shape, generator=generator) < self._share)


def learn_tokens(site: Site, lowered: OnnxGraph, stepper: Stepper, batch: int, tokens: Tokens) -> Tensor | None:
    """The valid keys (B, T) of an attention; in self-attention they are remembered as valid tokens."""
    if not isinstance(site, AttentionSite):
        return None
    own = ports(lowered, site)
    query, key = stepper.value(own.query, batch), stepper.value(own.key, batch)
    bias = stepper.value(own.bias, batch) if own.bias else None
    valid_BT = valid_keys(bias, key.shape[0], _tokens(key))
    if not site.cross and _tokens(query) <= _tokens(key) and query.shape[0] == key.shape[0]:
        tokens.learn(batch, valid_BT[:, valid_BT.shape[1] - _tokens(query) :])
    return valid_BT


def statistics_of(
    site: Site,
    lowered: OnnxGraph,
    stepper: Stepper,
    tokens: Tokens,
    batches: list[int],
    targets: Iterator[tuple[Tensor | None, Tensor | None]],
    heads: bool = True,
) -> SiteStatistics:
    """Statistics of the site as it stands in `stepper`'s graph.

    `targets` gives per batch what the output should be (None: what it is) and the drift of the residual (or None), in
    the layout of the site's output value. Without `heads` the Grams of queries and keys are left out (they are costly,
    to no purpose where no pass asks for them).
    """
    regression = RegressionAccumulator(output_weights(site))
    queries, keys = HeadGramAccumulator(), HeadGramAccumulator()
    for batch, (output, drift) in zip(batches, targets, strict=True):
        valid_BT = learn_tokens(site, lowered, stepper, batch, tokens)
        features = stepper.value(feature_name(site), batch)
        picked = tokens.of(batch, tuple(features.shape[:-1]))
        rows, target, residual = rows_of(site, features, output, drift)
        regression.add(rows[picked], *(None if part is None else part[picked] for part in (target, residual)))
        if heads and isinstance(site, AttentionSite) and valid_BT is not None:
            own = ports(lowered, site)
            query = _split(stepper.value(own.query, batch), own.query_heads)[:, :, list(site.query.head_of)]
            key = _split(stepper.value(own.key, batch), own.key_heads)
            queries.add(query.reshape(-1, *query.shape[2:])[picked])
            keys.add(centred(key, valid_BT)[valid_BT])
    if not heads or not isinstance(site, AttentionSite):
        return SiteStatistics(regression.result())
    return SiteStatistics(regression.result(), queries.result(), keys.result())


def rows_of(
    site: Site, features: Tensor, output: Tensor | None, drift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Features (N, F), output (N, C) and drift (N, C) with matching rows, whatever the layout of the output value."""
    lead = tuple(features.shape[:-1])
    layout = None if isinstance(site, FeedForwardSite) else site.output
    swapped = layout is not None and layout.time_first

    def flat(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if layout is not None and layout.channels_first:
            value = value.flatten(2).transpose(1, 2)
        width = value.shape[-1]
        if not swapped:
            return value.reshape(-1, width)
        return value.reshape(lead[1], lead[0], width).transpose(0, 1).reshape(-1, width)

    return features.reshape(-1, features.shape[-1]), flat(output), flat(drift)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)


def _tokens(operand: Tensor) -> int:
    """Tokens of an operand: (B, tokens, G * D) or (B, G, tokens, D)."""
    return int(operand.shape[-2])


def _split(operand: Tensor, heads: int) -> Tensor:
    """An operand as (B, tokens, G, D)."""
    if operand.ndim == 4:
        return operand.transpose(1, 2)
    return operand.reshape(*operand.shape[:2], heads, -1)
