"""From the values of a lowered graph to rows of tokens: where a site's inner values are, and which tokens count."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.attention.lower import fragment
from rewriter.calibration.details import Details, Inner
from rewriter.calibration.statistics import (
    RegressionAccumulator,
    StreamRegression,
    valid_keys,
)
from rewriter.core.rewrite import output_weights
from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, FeedForwardStatistics, Statistics
from rewriter.graph.composites import is_composite
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Stepper


@dataclass(frozen=True)
class Ports:
    """Names of an attention's inner values in a lowered graph, as they enter its `Attention` composite."""

    query: str
    key: str
    value: str
    bias: str
    query_heads: int
    key_heads: int
    value_heads: int

    @classmethod
    def of(cls, node: ir.Node) -> Ports:
        """Of an `Attention` composite."""
        names = [_name(value) for value in node.inputs]
        heads = [node.attributes[f"{role}_heads"].as_int() for role in ("query", "key", "value")]
        query, key, value, bias = (*names, "")[:4]
        return cls(query, key, value, bias, heads[0], heads[1], heads[2])

    @property
    def names(self) -> set[str]:
        """The values that there are."""
        return {self.query, self.key, self.value, *([self.bias] if self.bias else [])}


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Everything known of one site on one stream; `details` are fields of `AttentionStatistics`."""

    regression: StreamRegression
    attention: bool = False
    details: dict[str, Array64] = field(default_factory=dict)
    source: StreamRegression | None = None

    def at(self, alpha: float) -> Statistics:
        """What a pass is given, with the target ``output + alpha * residual``."""
        regression = self.regression.target(alpha)
        if not self.attention:
            return FeedForwardStatistics(regression)
        source = None if self.source is None else self.source.target(alpha)
        return AttentionStatistics(features=regression, source=source, **self.details)


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
    return Ports.of(node)


def inner_names(lowered: OnnxGraph, site: Site) -> set[str]:
    """Everything a walk asks of a site: its output and features, an attention's queries, keys and bias."""
    names = {output_name(site), feature_name(site)}
    if isinstance(site, AttentionSite):
        names |= ports(lowered, site).names
        names |= {site.query.source} if site.query.source else set()
    return names


class Values:
    """The inner values of a site, as the walked graph has them or, once it was rewritten, from its own nodes."""

    def __init__(self, site: Site, lowered: OnnxGraph, stepper: Stepper, rewritten_in: OnnxGraph | None = None) -> None:
        self._stepper = stepper
        self._made = None if rewritten_in is None else fragment(rewritten_in, site)
        self._batch, self._found = -1, dict[str, Tensor]()
        self._wanted = {feature_name(site)}
        self.ports: Ports | None = None
        if isinstance(site, AttentionSite):
            nodes = () if self._made is None else self._made.nodes
            own = next((node for node in nodes if is_composite(node, "Attention")), None)
            self.ports = ports(lowered, site) if own is None else Ports.of(own)
            self._wanted |= self.ports.names

    def __call__(self, name: str, batch: int) -> Tensor:
        """A value on a batch."""
        if self._made is None or name not in self._wanted:
            return self._stepper.value(name, batch)
        if self._batch != batch:
            self._batch, self._found = batch, self._stepper.run_fragment(self._made, batch, self._wanted)
        return self._found[name]


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
    wanted: Collection[Detail] = frozenset(),
    rewritten_in: OnnxGraph | None = None,
) -> SiteStatistics:
    """Statistics of the site as it stands in `stepper`'s graph, or as rewritten on top of the graph `rewritten_in`.

    `targets` gives per batch what the output should be (None: what it is) and the drift of the residual (or None), in
    the layout of the site's output value. `wanted` are the details of an attention to collect.
    """
    values = Values(site, lowered, stepper, rewritten_in)
    regression = RegressionAccumulator(output_weights(site))
    source = (
        RegressionAccumulator(_no_weights(site)) if "source" in wanted and isinstance(site, AttentionSite) else None
    )
    details = Details(site, wanted) if isinstance(site, AttentionSite) else None
    for batch, (output, drift) in zip(batches, targets, strict=True):
        valid_BT = learn_tokens(site, lowered, stepper, batch, tokens) if rewritten_in is None else None
        features = values(feature_name(site), batch)
        lead = tuple(features.shape[:-1])
        picked = tokens.of(batch, lead)
        rows, target, residual = rows_of(site, features, output, drift)
        parts = [None if part is None else part[picked] for part in (target, residual)]
        regression.add(rows[picked], *parts)
        if not isinstance(site, AttentionSite) or details is None:
            continue
        if source is not None:
            made = rows @ torch.from_numpy(output_weights(site)).to(rows.dtype)[:-1] if target is None else None
            read = source_rows(site, stepper.value(site.query.source, batch))[picked]
            source.add(read, parts[0] if made is None else _with_bias(site, made)[picked], parts[1])
        if wanted and values.ports is not None:
            details.add(_inner(site, values, batch, picked.reshape(lead), valid_BT))
    found = {} if details is None else details.fields()
    return SiteStatistics(regression.result(), details is not None, found, None if source is None else source.result())


def _inner(site: AttentionSite, values: Values, batch: int, queries_BS: Tensor, valid_BT: Tensor | None) -> Inner:
    own = values.ports
    assert own is not None
    query, key, value = (
        _split(values(name, batch), heads)
        for name, heads in ((own.query, own.query_heads), (own.key, own.key_heads), (own.value, own.value_heads))
    )
    bias = values(own.bias, batch) if own.bias else None
    if valid_BT is None:
        valid_BT = valid_keys(bias, key.shape[0], key.shape[1])
    return Inner(query[:, :, list(site.query.head_of)], key, value, bias, queries_BS, valid_BT)


def _no_weights(site: AttentionSite) -> Array64:
    """Zeros for a regression of the block's input onto its output."""
    assert site.output is not None and site.query.weight_CGD is not None
    return np.zeros((site.query.weight_CGD.shape[0] + 1, site.output.weight_HDC.shape[2]))


def _with_bias(site: AttentionSite, made: Tensor) -> Tensor:
    return made + torch.from_numpy(output_weights(site)[-1]).to(made.dtype)


def source_rows(site: AttentionSite, source: Tensor) -> Tensor:
    """What the queries' projection reads, (N, C), tokens in the order of `rows_of`."""
    operand = site.query
    if operand.time_first:
        source = source.transpose(0, 1)
    if operand.channels_first:
        source = source.flatten(2).transpose(1, 2)
    return source.reshape(-1, source.shape[-1])


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
        if layout is not None and layout.apart:
            sizes = (*lead, layout.apart, value.numel() // (lead[0] * lead[1] * layout.apart))
            value = value.reshape([sizes[axis] for axis in layout.perm])
            value = value.permute([layout.perm.index(axis) for axis in range(4)]).flatten(2)
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
