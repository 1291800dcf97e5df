"""What a site is made of: projections with their norms and rotations, what is added to the scores, the output.

Axis letters as in `rewriter.core.site`, which is where these are imported from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021): which table values turn the leading `size` dims, and how.

    `table_form` says which steps turn the graph's tables into what broadcasts to (B, G, S, size): ``heads`` inserts
    axis 1, ``swap`` exchanges axes 1 and 2, ``double`` repeats a table of half the size (interleaved if the pairs are).
    Once frequency pairs were dropped, `keep` has for every head of the operand the columns of the tables that stay
    (`size` of them, in the layout that `interleaved` says); it is empty while nothing was dropped.
    """

    cos: str
    sin: str
    size: int
    interleaved: bool
    sign: int = 1
    table_form: tuple[str, ...] = ()
    keep: tuple[tuple[int, ...], ...] = ()

    def keep_heads(self, heads: Sequence[int]) -> Rotary:
        """The tables for only these heads of the operand."""
        return replace(self, keep=tuple(self.keep[head] for head in heads)) if self.keep else self


@dataclass(frozen=True)
class HeadNorm:
    """A norm over the dims of one head, between projection and rotation, or after the rotation.

    With `across_heads` it is one norm over the dims of all heads together, and gain and bias are (G, D). So are they
    where every head has gains of its own.
    """

    kind: Literal["layer", "rms"]
    gain_D: Array
    bias_D: Array | None
    epsilon: float
    across_heads: bool = False
    after_rotation: bool = False

    @property
    def per_head(self) -> bool:
        """Whether every head has gains of its own."""
        return self.gain_D.ndim == 2 and not self.across_heads

    def keep_heads(self, heads: Sequence[int]) -> HeadNorm:
        """The norm for only these heads of the operand."""
        if not self.per_head:
            return self
        bias_D = None if self.bias_D is None else self.bias_D[list(heads)]
        return replace(self, gain_D=self.gain_D[list(heads)], bias_D=bias_D)


@dataclass(frozen=True)
class Projection:
    """One operand of an attention: ``rotary(norm(source_BSC @ weight_CGD + bias_GD))``, or an opaque value.

    `head_of[h]` is the operand's head that query head `h` reads (grouped-query attention needs no other description).
    `source` names a value of shape (B, S, C); with `time_first` its first two axes are swapped; with `flatten` it has
    several token axes; with `channels_first` it is (B, C, tokens...). `past`/`present` name the cache value put before
    the tokens and the value that holds both. With `places`, a value (B, T), the cache holds at each place the one of
    the joined tokens that it numbers, and zeros where it is negative. Where a rewrite changed what is cached,
    `cache_map` (G, D, G', D') makes a cache of this operand from one of the model as it was.
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
    places: str = ""
    cache_map: Array | None = None
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
            norm=None if self.norm is None else self.norm.keep_heads(left),
            rotary=None if self.rotary is None else self.rotary.keep_heads(left),
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
    valid; other keys get `padding_fill`. With a `window` of w, keys w or more tokens away from the query are hidden,
    but for the first `sinks` keys; 0 is no window. With `logarithm` the end of a ``path`` is a share of attention,
    whose logarithm is added. `kept` names the ends of the path that tells where the content counts at all: where the
    scores do not move with the product, what is added to them is the score.
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
    window: int = 0
    sinks: int = 0
    logarithm: bool = False
    kept: tuple[str, str] = ("", "")

    @property
    def nothing(self) -> bool:
        """Whether nothing at all is added to the scores."""
        return self.kind == "none" and not self.also_causal and not self.padding and not self.window

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
    # heads the result is cut into: (B, S, apart, D), axes in the order of `perm`; in rank 3 the first two are merged
    apart: int = 0
    perm: tuple[int, ...] = ()

    @property
    def bare(self) -> bool:
        """Whether the features themselves are the result: the graph has no projection here, and none was made."""
        heads, dim, width = self.weight_HDC.shape
        if self.weight_name or self.bias_C is not None or heads * dim != width:
            return False
        return bool(np.array_equal(self.weight_HDC.reshape(width, width), np.eye(width)))
