"""Sites: the meaning of one attention or feed-forward, free of any framework.

A site is raised once from a graph (`rewriter.attention`), rewritten by passes (data in, data out) and lowered anew.
It refers to values of the graph by name and holds weights as arrays. Axis letters in names:

    B batch   S query tokens   T key tokens   C model width   F hidden width
    H query heads   G heads of an operand   D head dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from rewriter.core.operand import Array, HeadNorm, OutputProjection, Projection, Rotary, ScoreBias
from rewriter.core.refusal import Refusal

__all__ = [
    "Array",
    "AttentionSite",
    "FeedForwardSite",
    "HeadNorm",
    "LinearSite",
    "OutputProjection",
    "Precision",
    "Projection",
    "RaisedSite",
    "Recognition",
    "Rotary",
    "ScoreBias",
    "Site",
    "State",
    "Step",
    "Unrecognised",
]

Precision = Literal["fp32", "bf16", "int8"]  # what the operands of a sub-block's linear layers are rounded to


class State(StrEnum):
    """How much is known of a site; each state includes the ones before it."""

    FOUND = "found"  # it is attention, with its heads and dims
    MAPPED = "mapped"  # weights known per head
    LOWERABLE = "lowerable"  # raise then lower was shown to be the identity


@dataclass(frozen=True)
class Step:
    """A standard operator with one output, or a ``Constant`` with its `array`: what a site writes besides itself.

    An attention operator of the graph may compute masks, tables and places in a cache inside itself; steps say how.
    """

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    array: Array | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``output(softmax(cap(scale * Q K^T) + bias) V)`` with everything rewrites need to know.

    `empty_rows` is what a query without any allowed key gives: ``nan``, or ``zero`` where the graph guards against it.
    `mask` and `position` are classifications for people and passes; the truth is in `bias`, `rotary` and the graph.
    `escapes` lists values inside the region that something outside reads (probabilities, queries, keys, values).
    `example_shape` has the sizes (B, S, T) met while raising, `order` the position of the site in the data flow.
    `precision` rounds the operands of every projection; below fp32 those of scores and mixing are in bf16.
    `sink_H` is a logit that every row of the softmax holds beside its keys, with no value; None if there is none.
    `packing` says which projections are one product that is split: ``kv``, ``qkv`` or none.
    `forms` are the ways of computing it that were chosen, one for each runtime that was asked (`core.forms`).
    `before` makes values that the description refers to and the graph does not hold, `after` further results of it.
    """

    id: str
    query: Projection
    key: Projection
    value: Projection
    output: OutputProjection | None
    heads: int
    scale: float
    softcap: float = 0.0
    bias: ScoreBias = field(default_factory=ScoreBias)
    empty_rows: Literal["nan", "zero"] = "nan"
    mask: Literal["none", "padding", "causal", "window", "additive", "opaque"] = "opaque"
    causal: bool = False
    position: Literal["none", "rotary", "bias", "opaque"] = "none"
    cross: bool = False
    escapes: tuple[str, ...] = ()
    state: State = State.FOUND
    nodes: tuple[str, ...] = ()
    problems: tuple[Refusal, ...] = ()
    example_shape: tuple[int, int, int] = (0, 0, 0)
    order: int = 0
    precision: Precision = "fp32"
    names: Mapping[str, str] = field(default_factory=dict)
    sink_H: Array | None = None
    packing: Literal["", "kv", "qkv"] = ""
    forms: tuple[str, ...] = ()
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

    @property
    def kv_heads(self) -> int:
        """Distinct key heads."""
        return self.key.heads

    @property
    def qk_dim(self) -> int:
        """Size of one query or key head."""
        return self.query.dim

    @property
    def v_dim(self) -> int:
        """Size of one value head."""
        return self.value.dim

    @property
    def mapped(self) -> bool:
        """Whether the weights of Q, K, V and O are known per head."""
        return self.output is not None and all(p.mapped for p in (self.query, self.key, self.value))

    @property
    def cached(self) -> bool:
        """Whether a cache is part of the model's signature here."""
        return bool(self.key.past or self.value.past or self.key.present or self.value.present)

    def keep_heads(self, query_heads: tuple[int, ...]) -> AttentionSite:
        """The same attention with only these query heads; exact when the others contribute nothing."""
        assert self.output is not None
        return replace(
            self,
            heads=len(query_heads),
            query=self.query.keep_heads(query_heads),
            key=self.key.keep_heads(query_heads),
            value=self.value.keep_heads(query_heads),
            bias=self.bias.keep_heads(query_heads),
            sink_H=None if self.sink_H is None else self.sink_H[list(query_heads)],
            output=replace(self.output, weight_HDC=np.ascontiguousarray(self.output.weight_HDC[list(query_heads)])),
        )


@dataclass(frozen=True)
class FeedForwardSite:
    """``output = act(source @ up + bias) [* (source @ gate + gate_bias)] @ down + down_bias``.

    `activation` is a known name (``gelu``, ``gelu_tanh``, ``quick_gelu``, ``relu``, ``silu``, ``tanh``, ``identity``)
    or ``path``: the graph's own element-wise nodes from `path_start` to `path_end` are copied. `source` has a batch
    axis where the graph has one; `rank` is that of the output, 2 where batch and tokens are merged in it.
    `precision` rounds the operands of every product.
    """

    id: str
    source: str
    up_CF: Array
    up_bias_F: Array | None
    down_FC: Array
    down_bias_C: Array | None
    output: str
    activation: str = "path"
    gate_CF: Array | None = None
    gate_bias_F: Array | None = None
    path_start: str = ""
    path_end: str = ""
    rank: int = 3
    weight_names: Mapping[str, str] = field(default_factory=dict)
    escapes: tuple[str, ...] = ()
    state: State = State.MAPPED
    nodes: tuple[str, ...] = ()
    problems: tuple[Refusal, ...] = ()
    example_shape: tuple[int, int] = (0, 0)
    order: int = 0
    precision: Precision = "fp32"

    @property
    def width(self) -> int:
        """Hidden width F."""
        return int(self.up_CF.shape[1])

    def keep_units(self, units: tuple[int, ...]) -> FeedForwardSite:
        """The same block with only these hidden units."""
        kept = list(units)

        def cut(array: Array | None) -> Array | None:
            return None if array is None else np.ascontiguousarray(array[..., kept])

        up_CF = cut(self.up_CF)
        assert up_CF is not None
        return replace(
            self,
            up_CF=up_CF,
            up_bias_F=cut(self.up_bias_F),
            gate_CF=cut(self.gate_CF),
            gate_bias_F=cut(self.gate_bias_F),
            down_FC=np.ascontiguousarray(self.down_FC[kept]),
        )


@dataclass(frozen=True)
class LinearSite:
    """What stands in an attention's place: ``features @ weight_HDC + bias``, every token by itself.

    `inner` makes the features of a token: ``source @ weight_CGD + bias_GD``, or the source itself where its weight is
    None. An output of no features (H = 0) is its bias alone. `replaces` is the attention that was here.
    """

    id: str
    inner: Projection
    output: OutputProjection
    replaces: AttentionSite
    precision: Precision = "fp32"

    @property
    def state(self) -> State:
        """As that of the attention."""
        return self.replaces.state

    @property
    def escapes(self) -> tuple[str, ...]:
        """As those of the attention."""
        return self.replaces.escapes

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of the attention."""
        return self.replaces.nodes

    @property
    def order(self) -> int:
        """The attention's place in the data flow."""
        return self.replaces.order

    @property
    def features(self) -> int:
        """How many features a token has."""
        return int(self.output.weight_HDC.shape[0] * self.output.weight_HDC.shape[1])


RaisedSite = AttentionSite | FeedForwardSite  # what a graph holds
Site = RaisedSite | LinearSite  # what a rewritten graph may hold


@dataclass(frozen=True)
class Unrecognised:
    """A softmax that looks like attention but was not understood: named, never skipped in silence."""

    node: str
    refusal: Refusal


@dataclass(frozen=True)
class Recognition:
    """Everything found in one graph, in data-flow order."""

    attention: tuple[AttentionSite, ...]
    feed_forward: tuple[FeedForwardSite, ...]
    unrecognised: tuple[Unrecognised, ...] = ()

    @property
    def sites(self) -> tuple[RaisedSite, ...]:
        """All sites in data-flow order."""
        both: tuple[RaisedSite, ...] = (*self.attention, *self.feed_forward)
        return tuple(sorted(both, key=lambda site: site.order))
