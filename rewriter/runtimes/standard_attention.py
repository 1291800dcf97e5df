"""The `Attention` composite in standard operators: written out, or as the `Attention` operator of opset 23.

Axis letters as in `rewriter.core.site`; G heads of an operand become H query heads by its `*_head_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from rewriter.runtimes.emitter import Emitter
from rewriter.runtimes.shapes import Size, Sizes, dtype_of, sizes_of


@dataclass(frozen=True)
class _Operand:
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
    def tokens(self) -> Size:
        """How many tokens, where known."""
        return self.sizes[-2] if self.rank == 4 else self.sizes[1]

    @property
    def direct(self) -> bool:
        """Whether query head h reads head h, or all read the one there is: nothing has to be gathered."""
        return self.heads == 1 or self.head_of == tuple(range(self.heads))


def split_heads(e: Emitter) -> ir.Value:
    """`SplitHeads`: (B, S, N) to (B, heads, S, N/heads)."""
    x = e.node.inputs[0]
    assert x is not None
    heads = e.node.attributes.get_int("heads", 1)
    return _heads_first(e, _Operand(x, sizes_of(x, 3), heads, tuple(range(heads))), (0, 2, 1, 3))


def attention(e: Emitter, fused: bool) -> ir.Value:
    """`Attention`: (B, S, H*Dv); one node if `fused` is wanted and means the same."""
    query, key, value = (_operand(e.node, index, name) for index, name in enumerate(("query", "key", "value")))
    bias = e.node.inputs[3] if len(e.node.inputs) > 3 else None
    if fused and _agrees(e, query, key, value, bias):
        return _fused(e, query, key, value, bias)
    return _decomposed(e, query, key, value, bias)


def _operand(node: ir.Node, index: int, name: str) -> _Operand:
    value = node.inputs[index]
    assert value is not None
    attributes = node.attributes
    heads = attributes.get_int(f"{name}_heads", attributes.get_int("heads", 1))
    head_of = attributes.get_ints(f"{name}_head_of", range(heads))
    return _Operand(value, sizes_of(value), heads, tuple(head_of))


def _heads_first(e: Emitter, x: _Operand, order: Sequence[int]) -> ir.Value:
    """(B, tokens, G*D) reshaped and permuted; with the order (0, 2, 3, 1) tokens come last."""
    apart = e.op("Reshape", x.value, e.ints(0, 0, x.heads, x.dim))
    return e.op("Transpose", apart, perm=list(order))


def _four_axes(e: Emitter, x: _Operand, tokens_last: bool = False) -> ir.Value:
    """(B, H, tokens, D) or (B, H, D, tokens), one permutation for both purposes; H may be 1 and broadcast."""
    if x.rank == 3:
        y = _heads_first(e, x, (0, 2, 3, 1) if tokens_last else (0, 2, 1, 3))
    else:
        y = e.op("Transpose", x.value, perm=[0, 1, 3, 2]) if tokens_last else x.value
    return y if x.direct else e.op("Gather", y, e.ints(*x.head_of), axis=1)


def _decomposed(e: Emitter, query: _Operand, key: _Operand, value: _Operand, bias: ir.Value | None) -> ir.Value:
    attributes, dtype = e.node.attributes, dtype_of(query.value)
    heads = attributes.get_int("heads", query.heads)
    scale, softcap = attributes.get_float("scale", 1.0), attributes.get_float("softcap", 0.0)
    query_BHSD = _four_axes(e, query)
    if query.heads == 1 and heads > 1 and key.heads == 1:
        # Nothing would give the result its H heads by broadcasting.
        query_BHSD = e.op("Gather", query_BHSD, e.ints(*([0] * heads)), axis=1)
    if scale != 1.0:
        query_BHSD = e.op("Mul", query_BHSD, e.scalar(scale, dtype))
    scores_BHST = e.op("MatMul", query_BHSD, _four_axes(e, key, tokens_last=True))
    if softcap:
        capped = e.op("Tanh", e.op("Mul", scores_BHST, e.scalar(1.0 / softcap, dtype)))
        scores_BHST = e.op("Mul", capped, e.scalar(softcap, dtype))
    kept, sink = (*e.node.inputs[4:6], None, None)[:2]
    if kept is not None:
        scores_BHST = e.op("Where", kept, scores_BHST, e.scalar(0.0, dtype))
    scores_BHST = _biased(e, scores_BHST, bias, dtype)
    weights_BHST = _softmax(e, scores_BHST, sink)
    features_BHSD = e.op("MatMul", weights_BHST, _four_axes(e, value))
    if attributes.get_string("empty_rows", "nan") == "zero":
        features_BHSD = _zero_where_empty(e, weights_BHST, features_BHSD, dtype)
    return _joined(e, features_BHSD, heads, value.dim)


def _softmax(e: Emitter, scores_BHST: ir.Value, sink_H: ir.Value | None) -> ir.Value:
    if sink_H is None:
        return e.op("Softmax", scores_BHST, axis=-1)
    sink_H11 = e.op("Reshape", sink_H, e.ints(-1, 1, 1))
    lead = e.op("Slice", e.op("Shape", scores_BHST), e.ints(0), e.ints(3))
    sink_BHS1 = e.op("Expand", sink_H11, e.op("Concat", lead, e.ints(1), axis=0))
    return e.cut(e.op("Softmax", e.op("Concat", scores_BHST, sink_BHS1, axis=-1), axis=-1), 0, -1)


def _biased(e: Emitter, scores_BHST: ir.Value, bias: ir.Value | None, dtype: np.dtype[Any]) -> ir.Value:
    kind = e.node.attributes.get_string("bias_kind", "none")
    if bias is None or kind == "none":
        return scores_BHST
    if kind == "bool":
        return e.op("Where", bias, scores_BHST, e.scalar(-np.inf, dtype))
    return e.op("Add", scores_BHST, bias)


def _zero_where_empty(e: Emitter, weights_BHST: ir.Value, features_BHSD: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """A row of softmax is NaN altogether or not at all: its first column tells, with no pass over (B, H, S, T)."""
    empty_BHS1 = e.op("IsNaN", e.cut(weights_BHST, 0, 1))
    return e.op("Where", empty_BHS1, e.scalar(0.0, dtype), features_BHSD)


def _joined(e: Emitter, features_BHSD: ir.Value, heads: int, dim: int) -> ir.Value:
    """(B, H, S, D) to (B, S, H*D)."""
    features_BSHD = e.op("Transpose", features_BHSD, perm=[0, 2, 1, 3])
    return e.op("Reshape", features_BSHD, e.ints(0, 0, heads * dim if dim > 0 else -1))


def _agrees(e: Emitter, query: _Operand, key: _Operand, value: _Operand, bias: ir.Value | None) -> bool:
    """Whether the operator of opset 23 means exactly this attention, in every runtime that has it.

    It groups heads consecutively, gives zeros for a row without keys, and wants a mask of two to four axes that covers
    all keys. Runtimes disagree on whether a cap comes before the mask. A mask that is added is written out: where all
    of a row is the most negative float its meaning is the mean of the values, and ONNX Runtime 1.31 gives zeros.
    """
    attributes = e.node.attributes
    heads = attributes.get_int("heads", query.heads)
    if any(value is not None for value in e.node.inputs[4:]):
        return False
    if e.opset < 23 or query.head_of != tuple(range(heads)) or query.heads != heads:
        return False
    if heads % key.heads or (key.heads, key.head_of) != (value.heads, value.head_of):
        return False
    if key.head_of != tuple(head // (heads // key.heads) for head in range(heads)):
        return False
    kind, softcap = attributes.get_string("bias_kind", "none"), attributes.get_float("softcap", 0.0)
    if bias is None or kind == "none":
        return True
    if kind != "bool" or attributes.get_string("empty_rows", "nan") != "zero" or softcap:
        return False
    sizes = sizes_of(bias)
    return 2 <= len(sizes) <= 4 and sizes[-1] not in (None, 1)


def _fused(e: Emitter, query: _Operand, key: _Operand, value: _Operand, bias: ir.Value | None) -> ir.Value:
    attributes = e.node.attributes
    form: Literal[3, 4] = 3 if {query.rank, key.rank, value.rank} == {3} else 4
    operands = (query, key, value)
    inputs = [x.value if x.rank == form else _heads_first(e, x, (0, 2, 1, 3)) for x in operands]
    masked = bias is not None and attributes.get_string("bias_kind", "none") != "none"
    mask = _every_query(e, query, bias) if masked and bias is not None else None
    extra: dict[str, Any] = {"q_num_heads": query.heads, "kv_num_heads": key.heads} if form == 3 else {}
    extra["scale"], extra["softcap"] = attributes.get_float("scale", 1.0), attributes.get_float("softcap", 0.0)
    y = e.op("Attention", *inputs, *([] if mask is None else [mask]), **extra)
    return y if form == 3 else _joined(e, y, query.heads, value.dim)


def _every_query(e: Emitter, query: _Operand, bias: ir.Value) -> ir.Value:
    """The bias with a row for each query: ONNX Runtime 1.31 refuses masks that are to be broadcast over queries."""
    sizes = sizes_of(bias)
    if query.tokens is not None and query.tokens == sizes[-2]:
        return bias
    queries = e.op("Shape", query.value, start=query.rank - 2, end=query.rank - 1)
    shape = e.op("Concat", e.ints(*([1] * (len(sizes) - 2))), queries, e.ints(1), axis=0)
    return e.op("Expand", bias, shape)
