"""The `Attention` composite as the standard forms read it: operands, their heads, and what is added to the scores.

Axis letters as in `rewriter.core.site`; G heads of an operand become H query heads by its `*_head_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.core.errors import UnsupportedOperator
from rewriter.runtimes.emitter import Emitter
from rewriter.runtimes.shapes import Size, Sizes, dtype_of, sizes_of


@dataclass(frozen=True)
class Operand:
    """One of query, key, value: `heads` are the G it has, `head_of` which of them each query head reads."""

    value: ir.Value
    sizes: Sizes
    heads: int
    head_of: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Dims of one head, or -1 when the graph does not say."""
        last = self.sizes[-1]
        return -1 if not isinstance(last, int) else last // (self.heads if self.rank == 3 else 1)

    @property
    def rank(self) -> int:
        """3 for (B, tokens, G*D), 4 for (B, G, tokens, D)."""
        return len(self.sizes)

    @property
    def token_axis(self) -> int:
        """Where the tokens are."""
        return self.rank - 2 if self.rank == 4 else 1

    @property
    def tokens(self) -> Size:
        """How many tokens, where known."""
        return self.sizes[self.token_axis]

    @property
    def one_to_one(self) -> bool:
        """Whether query head h reads head h."""
        return self.head_of == tuple(range(self.heads))

    @property
    def direct(self) -> bool:
        """Whether query head h reads head h, or all read the one there is: nothing has to be gathered."""
        return self.heads == 1 or self.one_to_one


@dataclass(frozen=True)
class Attended:
    """A whole `Attention` composite. `causal` is what is known of its mask: nothing, ``also`` if it hides every later
    key, ``only`` if it hides no other one."""

    query: Operand
    key: Operand
    value: Operand
    heads: int
    scale: float
    softcap: float
    bias: ir.Value | None
    bias_kind: str
    zero_rows: bool
    causal: str
    kept: ir.Value | None
    sink: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node) -> Attended:
        """Read the node."""
        query, key, value = (_operand(node, index, role) for index, role in enumerate(("query", "key", "value")))
        attributes = node.attributes
        bias, kept, sink = (*node.inputs[3:6], None, None, None)[:3]
        kind = attributes.get_string("bias_kind", "none")
        return cls(
            query, key, value,
            heads=attributes.get_int("heads", query.heads),
            scale=_stored(attributes.get_float("scale", 1.0)),
            softcap=_stored(attributes.get_float("softcap", 0.0)),
            bias=None if kind == "none" else bias,
            bias_kind=kind if bias is not None else "none",
            zero_rows=attributes.get_string("empty_rows", "nan") == "zero",
            causal=attributes.get_string("causal", ""),
            kept=kept, sink=sink,
        )  # fmt: skip

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Query, key, value."""
        return self.query, self.key, self.value

    @property
    def bias_known(self) -> bool:
        """Whether the axes of the bias are known, without which no operator can be given it."""
        try:
            return self.bias is None or bool(sizes_of(self.bias))
        except UnsupportedOperator:
            return False

    @property
    def plain(self) -> bool:
        """Whether the scores are products and additions alone, and every head has a query of its own."""
        own = self.query.one_to_one and self.query.heads == self.heads
        return own and self.kept is None and self.sink is None

    @property
    def grouped(self) -> bool:
        """Whether keys and values have the same heads, each read by as many consecutive query heads."""
        if self.heads % self.key.heads or (self.key.heads, self.key.head_of) != (self.value.heads, self.value.head_of):
            return False
        share = self.heads // self.key.heads
        return self.key.head_of == tuple(head // share for head in range(self.heads))


def _stored(number: float) -> float:
    """As a file holds it, whether it becomes a constant or an attribute."""
    return float(np.float32(number))


def _operand(node: ir.Node, index: int, role: str) -> Operand:
    value = node.inputs[index]
    assert value is not None
    attributes = node.attributes
    heads = attributes.get_int(f"{role}_heads", attributes.get_int("heads", 1))
    head_of = attributes.get_ints(f"{role}_head_of", range(heads))
    return Operand(value, sizes_of(value), heads, tuple(head_of))


def split_heads(e: Emitter) -> ir.Value:
    """`SplitHeads`: (B, S, N) to (B, heads, S, N/heads)."""
    x = e.node.inputs[0]
    assert x is not None
    heads = e.node.attributes.get_int("heads", 1)
    return heads_first(e, Operand(x, sizes_of(x, 3), heads, tuple(range(heads))), (0, 2, 1, 3))


def heads_first(e: Emitter, x: Operand, order: Sequence[int]) -> ir.Value:
    """(B, tokens, G*D) reshaped and permuted; with the order (0, 2, 3, 1) tokens come last."""
    apart = e.op("Reshape", x.value, e.ints(0, 0, x.heads, x.dim))
    return e.op("Transpose", apart, perm=list(order))


def four_axes(e: Emitter, x: Operand, tokens_last: bool = False) -> ir.Value:
    """(B, H, tokens, D) or (B, H, D, tokens), one permutation for both purposes; H may be 1 and broadcast."""
    if x.rank == 3:
        y = heads_first(e, x, (0, 2, 3, 1) if tokens_last else (0, 2, 1, 3))
    else:
        y = e.op("Transpose", x.value, perm=[0, 1, 3, 2]) if tokens_last else x.value
    return y if x.direct else e.op("Gather", y, e.ints(*x.head_of), axis=1)


def three_axes(e: Emitter, x: Operand) -> ir.Value:
    """(B, tokens, G*D)."""
    return x.value if x.rank == 3 else joined(e, x.value, x.heads, x.dim)


def joined(e: Emitter, features_BHSD: ir.Value, heads: int, dim: int) -> ir.Value:
    """(B, H, S, D) to (B, S, H*D)."""
    features_BSHD = e.op("Transpose", features_BHSD, perm=[0, 2, 1, 3])
    return e.op("Reshape", features_BSHD, e.ints(0, 0, heads * dim if dim > 0 else -1))


@dataclass(frozen=True)
class AddedBias:
    """What is added to the scores, in which no row hides every key, and which rows did: `empty` is None without a bias.

    Kernels differ in what they make of rows without a key, so none is shown one; `restore` says what such rows give.
    """

    value: ir.Value | None
    empty: ir.Value | None
    by_heads: bool

    @classmethod
    def of(cls, e: Emitter, site: Attended, tokens_of: ir.Value | None = None) -> AddedBias:
        """The bias of a site, (B | 1, H | 1, S, T); shared by the sites that read the same mask.

        `tokens_of` (B, S, C) says how many queries and keys there are where no operand is left to ask.
        """
        if site.bias is None:
            return cls(None, None, False)
        bias, dtype = site.bias, dtype_of(site.query.value)
        sizes = sizes_of(bias)
        wide = (1,) * (4 - len(sizes)) + sizes

        def added() -> tuple[ir.Value, ir.Value]:
            low = e.scalar(-np.inf, dtype)
            value = bias
            if site.bias_kind == "bool":
                value = e.op("Where", bias, e.scalar(0.0, dtype), low)
            if len(sizes) < 4:
                value = e.unsqueeze(value, *range(4 - len(sizes)))
            empty = e.op("Equal", e.reduce("ReduceMax", value), low)
            safe = e.op("Where", empty, e.scalar(0.0, dtype), value)
            return _every_pair(e, site, safe, wide, tokens_of), empty

        known = site.query.tokens is not None and site.key.tokens is not None
        key = ("bias", id(bias), dtype.str, site.query.tokens, site.key.tokens)
        value, empty = e.once(key, added) if known else added()
        return cls(value, empty, wide[1] != 1)

    def restore(self, e: Emitter, features_BSN: ir.Value, site: Attended) -> ir.Value:
        """The features with what the site gives in rows without a key."""
        if self.empty is None:
            return features_BSN
        fill = e.scalar(0.0 if site.zero_rows else np.nan, dtype_of(site.query.value))
        if not self.by_heads:
            empty = self.empty
            empty_BS1 = e.once(("empty", id(empty)), lambda: (e.squeeze(empty, 1),))[0]
            return e.op("Where", empty_BS1, fill, features_BSN)
        apart = e.op("Reshape", features_BSN, e.ints(0, 0, site.heads, site.value.dim))
        empty_BSH1 = e.op("Transpose", self.empty, perm=[0, 2, 1, 3])
        whole = e.op("Where", empty_BSH1, fill, apart)
        return e.op("Reshape", whole, e.ints(0, 0, site.heads * site.value.dim))


def _every_pair(e: Emitter, site: Attended, bias: ir.Value, sizes: Sizes, tokens_of: ir.Value | None) -> ir.Value:
    """With an entry for every query and every key: kernels broadcast over the batch and over heads only."""
    wanted = (site.query.tokens, site.key.tokens)
    if None not in wanted and tuple(sizes[2:]) == wanted:
        return bias
    pair = [(one.value, one.token_axis) for one in (site.query, site.key)]
    lengths = [token_count(e, *one) for one in (pair if tokens_of is None else [(tokens_of, 1)] * 2)]
    return e.op("Expand", bias, e.op("Concat", e.ints(1, 1), *lengths, axis=0))


def token_count(e: Emitter, x: ir.Value, axis: int) -> ir.Value:
    """The size of an axis, as one int64 in one axis."""
    return e.op("Slice", e.op("Shape", x), e.ints(axis), e.ints(axis + 1))
