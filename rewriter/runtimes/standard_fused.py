"""An attention as one operator: ONNX `Attention`, and those of com.microsoft that ONNX Runtime has kernels for.

`fits` says where an operator means the same by its definition. What a kernel makes of it is another matter: forms
are compared with the written-out one, in the runtime, before they may be chosen (`rewriter.search.forms`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from rewriter.core.forms import ATTENTION, ATTENTION_OPSET, GROUP_QUERY, MULTI_HEAD, PACKED
from rewriter.runtimes.emitter import Emitter
from rewriter.runtimes.shapes import dtype_of
from rewriter.runtimes.standard_operands import (
    AddedBias,
    Attended,
    Operand,
    four_axes,
    heads_first,
    joined,
    three_axes,
    token_count,
)
from rewriter.runtimes.standard_packed import fits_packed, write_packed

MICROSOFT = "com.microsoft"
_INT32 = int(ir.DataType.INT32)


@dataclass(frozen=True)
class Fused:
    """One operator: whether it can say what a site does, and how it is written."""

    fits: Callable[[Emitter, Attended], bool]
    write: Callable[[Emitter, Attended], ir.Value]


def _fits_attention(e: Emitter, site: Attended) -> bool:
    """The operator of opset 23 groups heads consecutively; runtimes disagree on whether a cap comes before a mask."""
    return e.opset >= ATTENTION_OPSET and site.plain and site.grouped and not (site.softcap and site.bias is not None)


def _attention(e: Emitter, site: Attended) -> ir.Value:
    form: Literal[3, 4] = 3 if {x.rank for x in site.operands} == {3} else 4
    inputs = [x.value if x.rank == form else heads_first(e, x, (0, 2, 1, 3)) for x in site.operands]
    extra: dict[str, Any] = {"q_num_heads": site.heads, "kv_num_heads": site.key.heads} if form == 3 else {}
    extra |= {"scale": site.scale, "softcap": site.softcap}
    if site.causal == "only":
        y, bias = e.op("Attention", *inputs, is_causal=1, **extra), AddedBias(None, None, False)
    else:
        bias = AddedBias.of(e, site)
        y = e.op("Attention", *inputs, *([] if bias.value is None else [bias.value]), **extra)
    return bias.restore(e, y if form == 3 else joined(e, y, site.heads, site.value.dim), site)


def _fits_multi_head(e: Emitter, site: Attended) -> bool:
    """It has no cap, and its scale must not be zero, which stands for the usual one."""
    return site.plain and not site.softcap and site.scale != 0.0 and _single(site)


def _multi_head(e: Emitter, site: Attended) -> ir.Value:
    sources = (site.key, site.value)
    if all(x.rank == 3 and x.one_to_one for x in sources):
        rest = [x.value for x in sources]
    else:
        rest = [_all_heads(e, x, site.heads) for x in sources]
        if not site.key.dim == site.value.dim > 0:  # heads of two sizes are taken flat only
            rest = [joined(e, y, site.heads, x.dim) for x, y in zip(sources, rest, strict=True)]
    only = site.causal == "only"
    bias = AddedBias(None, None, False) if only else AddedBias.of(e, site)
    inputs = [three_axes(e, site.query), *rest, None, None, bias.value]
    extra = {"unidirectional": 1} if only else {}
    while inputs[-1] is None:
        inputs.pop()
    y = e.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=site.heads, scale=site.scale, **extra)
    return bias.restore(e, y, site)


def _all_heads(e: Emitter, x: Operand, heads: int) -> ir.Value:
    """(B, H, tokens, D) where no axis is left to broadcast."""
    y = four_axes(e, x)
    return e.op("Gather", y, e.ints(*([0] * heads)), axis=1) if x.heads == 1 and heads > 1 else y


def _fits_group_query(e: Emitter, site: Attended) -> bool:
    """It hides later keys in any case, and has one size of head."""
    sizes = site.query.dim == site.key.dim == site.value.dim > 0
    return bool(site.causal) and site.plain and site.grouped and sizes and site.scale != 0.0 and _single(site)


def _group_query(e: Emitter, site: Attended) -> ir.Value:
    only = site.causal == "only"
    bias = AddedBias(None, None, False) if only else AddedBias.of(e, site)
    total = e.op("Cast", token_count(e, site.key.value, site.key.token_axis), to=_INT32)
    batch = e.op("Slice", e.op("Shape", site.query.value), e.ints(0), e.ints(1))
    ends = e.op("Expand", e.op("Sub", total, e.op("Cast", e.ints(1), to=_INT32)), batch)
    inputs = [three_axes(e, x) for x in site.operands]
    more = [None, None, ends, e.squeeze(total, 0), None, None, None, bias.value]
    while more[-1] is None:
        more.pop()
    y = e.op(
        "GroupQueryAttention", *inputs, *more, domain=MICROSOFT, num_heads=site.heads, kv_num_heads=site.key.heads,
        scale=site.scale, softcap=site.softcap,
    )  # fmt: skip
    return bias.restore(e, y, site)


def _single(site: Attended) -> bool:
    """Kernels for processors are in float32."""
    return dtype_of(site.query.value).itemsize == 4 and dtype_of(site.query.value).kind == "f"


FUSED: Mapping[str, Fused] = {
    ATTENTION: Fused(_fits_attention, _attention),
    MULTI_HEAD: Fused(_fits_multi_head, _multi_head),
    GROUP_QUERY: Fused(_fits_group_query, _group_query),
    PACKED: Fused(fits_packed, write_packed),
}
