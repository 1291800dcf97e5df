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
from numpy.typing import NDArray

from rewriter.core.refusal import Refusal

Array = NDArray[Any]
Precision = Literal["fp32", "bf16", "int8"]  # what the operands of a sub-block's linear layers are rounded to


class State(StrEnum):
    """How much is known of a site; each state includes the ones before it."""

    FOUND = "found"  # it is attention, with its heads and dims
    MAPPED = "mapped"  # weights known per head
    LOWERABLE = "lowerable"  # raise then lower was shown to be the identity


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021): which table values turn the leading `size` dims, and how.

    `table_form` says which steps turn the graph's tables into what broadcasts to (B, G, S, size): ``heads`` inserts
    axis 1, ``swap`` exchanges axes 1 and 2, ``double`` repeats a table of half the size (interleaved if the pairs are).
    """

    cos: str
    sin: str
    size: int
    interleaved: bool
    sign: int = 1
    table_form: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadNorm:
    """A norm over the dims of one head, between projection and rotation.

    With `across_heads` it is one norm over the dims of all heads together, and gain and bias are (G, D).
    """

    kind: Literal["layer", "rms"]
    gain_D: Array
    bias_D: Array | None
    epsilon: float
    across_heads: bool = False


@dataclass(frozen=True)
class Projection:
    """One operand of an attention: ``rotary(norm(source_BSC @ weight_CGD + bias_GD))``, or an opaque value.

    `head_of[h]` is the operand's head that query head `h` reads (grouped-query attention needs no other description).
    `source` names a value of shape (B, S, C); with `time_first` its first two axes are swapped; with `flatten` it has
    several token axes; with `channels_first` it is (B, C, tokens...). `past`/`present` name the cache value put before
    the tokens and the value that holds both.
    An opaque operand is a value of shape (B, G, S, D) — (B, G, D, S) if `opaque_transposed` — used as it is.
    """

    source: str = ""
    weight_CGD: Array | None = None
    bias_GD: Array | None = None
    weight_name: str = ""
    bias_name: str = ""
    time_first: bool = False
    flatten: bool = False
    channels_first: bool = False
    norm: HeadNorm | None = None
    rotary: Rotary | None = None
    past: str = ""
    present: str = ""
    head_of: tuple[int, ...] = ()
    opaque: str = ""
    opaque_transposed: bool = False
    opaque_heads: int = 0
    opaque_dim: int = 0
    opaque_why: str = ""

    @property
    def mapped(self) -> bool:
        """Whether the weights of every head are known."""
        return self.weight_CGD is not None

    @property
    def heads(self) -> int:
        """Distinct heads of this operand (the KV heads, for keys and values)."""
        return self.opaque_heads if self.weight_CGD is None else int(self.weight_CGD.shape[1])

    @property
    def dim(self) -> int:
        """Size of one head."""
        return self.opaque_dim if self.weight_CGD is None else int(self.weight_CGD.shape[2])

    @property
    def plain(self) -> bool:
        """A bare linear map: no norm, no rotation, no cache. What low-rank rewrites need."""
        cached = bool(self.past or self.present)
        return self.mapped and self.norm is None and self.rotary is None and not cached

    def keep_heads(self, query_heads: tuple[int, ...]) -> Projection:
        """The operand for only these query heads, with heads nobody reads cut away where weights are known."""
        used = [self.head_of[h] for h in query_heads]
        if not self.mapped or self.past or self.present:
            return replace(self, head_of=tuple(used))
        assert self.weight_CGD is not None
        left = sorted(set(used))
        return replace(
            self,
            weight_CGD=np.ascontiguousarray(self.weight_CGD[:, left]),
            bias_GD=None if self.bias_GD is None else self.bias_GD[left],
            head_of=tuple(left.index(u) for u in used),
        )


@dataclass(frozen=True)
class ScoreBias:
    """What is added to the scaled scores: a reference into the graph, never a copy of its content.

    `kind`: ``none``; ``value`` (`value` is added); ``bool`` (`value` is True where attending is allowed); ``causal``
    (query i sees keys up to i, counted from the left of both); ``fill`` (scores are replaced by one low number, or by
    minus infinity if `infinite`, where `value` equals `filled_by`); ``path`` (the
    graph's own nodes from `value` to `path_end`, evaluated with the content product set to zero).
    `full_shape` says that a ``path`` needs zeros of the product's full shape. `heads_axis` is how many heads the bias
    tells apart (1: shared by all), `keep` selects among them once heads were removed, `folded` says that batch and
    heads share one axis in the graph. `product_rank` is the rank of the product a ``path`` starts from, `lead` its head
    axes where there are several. On top of it come, where an operator of the graph applied them, causality
    (`also_causal`:
    aligned at the ``start`` or ``end`` of the keys) and `padding`, a value (B, T) that is not zero where a key is
    valid; other keys get `padding_fill`.
    """

    kind: Literal["none", "value", "bool", "causal", "fill", "path"] = "none"
    value: str = ""
    path_end: str = ""
    full_shape: bool = False
    heads_axis: int = 1
    folded: bool = False
    product_rank: int = 4
    lead: tuple[int, ...] = ()
    filled_by: bool = True
    infinite: bool = False
    keep: tuple[int, ...] | None = None
    also_causal: str = ""
    padding: str = ""
    padding_fill: float = 0.0

    @property
    def nothing(self) -> bool:
        """Whether nothing at all is added to the scores."""
        return self.kind == "none" and not self.also_causal and not self.padding

    def keep_heads(self, query_heads: tuple[int, ...]) -> ScoreBias:
        """The bias for only these query heads."""
        if self.kind == "none" or self.heads_axis == 1:
            return self
        before = self.keep if self.keep is not None else tuple(range(self.heads_axis))
        return replace(self, keep=tuple(before[h] for h in query_heads))


@dataclass(frozen=True)
class OutputProjection:
    """``output = features_BSHD @ weight_HDC + bias_C``; `value` is the graph's name of the result.

    `rank`, `time_first` and `flatten_like` (a value whose leading axes the result takes) say how the graph lays the
    result out. `bias_C` is what the linear node itself adds; a bias added later stays outside unless absorbed.
    """

    value: str
    weight_HDC: Array
    bias_C: Array | None = None
    weight_name: str = ""
    bias_name: str = ""
    rank: int = 3
    time_first: bool = False
    flatten_like: str = ""
    channels_first: bool = False  # the result is (B, C, tokens...), with the token axes of `flatten_like`


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``output(softmax(cap(scale * Q K^T) + bias) V)`` with everything rewrites need to know.

    `empty_rows` is what a query without any allowed key gives: ``nan``, or ``zero`` where the graph guards against it.
    `mask` and `position` are classifications for people and passes; the truth is in `bias`, `rotary` and the graph.
    `escapes` lists values inside the region that something outside reads (probabilities, queries, keys, values).
    `example_shape` has the sizes (B, S, T) met while raising, `order` the position of the site in the data flow.
    `precision` rounds the operands of every projection; below fp32 those of scores and mixing are in bf16.
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


Site = AttentionSite | FeedForwardSite


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
    def sites(self) -> tuple[Site, ...]:
        """All sites in data-flow order."""
        both: tuple[Site, ...] = (*self.attention, *self.feed_forward)
        return tuple(sorted(both, key=lambda site: site.order))
