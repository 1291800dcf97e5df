"""The `Attention` composite written out in standard operators, or handed to one operator that means the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.core.forms import DECOMPOSED
from rewriter.runtimes.emitter import Emitter
from rewriter.runtimes.shapes import dtype_of
from rewriter.runtimes.standard_fused import FUSED
from rewriter.runtimes.standard_operands import Attended, four_axes, joined


def attention(e: Emitter, form: str) -> ir.Value:
    """`Attention`: (B, S, H*Dv); in the wanted form where the operator means the same, else written out."""
    site = Attended.of(e.node)
    fused = FUSED.get(form)
    if form != DECOMPOSED and fused is not None and site.bias_known and fused.fits(e, site):
        return fused.write(e, site)
    return _decomposed(e, site)


def _decomposed(e: Emitter, site: Attended) -> ir.Value:
    query, key, value = site.operands
    heads, scale, softcap, dtype = site.heads, site.scale, site.softcap, dtype_of(query.value)
    query_BHSD = four_axes(e, query)
    if query.heads == 1 and heads > 1 and key.heads == 1:
        # Nothing would give the result its H heads by broadcasting.
        query_BHSD = e.op("Gather", query_BHSD, e.ints(*([0] * heads)), axis=1)
    if scale != 1.0:
        query_BHSD = e.op("Mul", query_BHSD, e.scalar(scale, dtype))
    scores_BHST = e.op("MatMul", query_BHSD, four_axes(e, key, tokens_last=True))
    if softcap:
        capped = e.op("Tanh", e.op("Mul", scores_BHST, e.scalar(1.0 / softcap, dtype)))
        scores_BHST = e.op("Mul", capped, e.scalar(softcap, dtype))
    if site.kept is not None:
        scores_BHST = e.op("Where", site.kept, scores_BHST, e.scalar(0.0, dtype))
    scores_BHST = _biased(e, scores_BHST, site, dtype)
    weights_BHST = _softmax(e, scores_BHST, site.sink)
    features_BHSD = e.op("MatMul", weights_BHST, four_axes(e, value))
    if site.zero_rows:
        features_BHSD = _zero_where_empty(e, weights_BHST, features_BHSD, dtype)
    return joined(e, features_BHSD, heads, value.dim)


def _softmax(e: Emitter, scores_BHST: ir.Value, sink_H: ir.Value | None) -> ir.Value:
    if sink_H is None:
        return e.op("Softmax", scores_BHST, axis=-1)
    sink_H11 = e.op("Reshape", sink_H, e.ints(-1, 1, 1))
    lead = e.op("Slice", e.op("Shape", scores_BHST), e.ints(0), e.ints(3))
    sink_BHS1 = e.op("Expand", sink_H11, e.op("Concat", lead, e.ints(1), axis=0))
    return e.cut(e.op("Softmax", e.op("Concat", scores_BHST, sink_BHS1, axis=-1), axis=-1), 0, -1)


def _biased(e: Emitter, scores_BHST: ir.Value, site: Attended, dtype: np.dtype[Any]) -> ir.Value:
    if site.bias is None:
        return scores_BHST
    if site.bias_kind == "bool":
        return e.op("Where", site.bias, scores_BHST, e.scalar(-np.inf, dtype))
    return e.op("Add", scores_BHST, site.bias)


def _zero_where_empty(e: Emitter, weights_BHST: ir.Value, features_BHSD: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """A row of softmax is NaN altogether or not at all: its first column tells, with no pass over (B, H, S, T)."""
    empty_BHS1 = e.op("IsNaN", e.cut(weights_BHST, 0, 1))
    return e.op("Where", empty_BHS1, e.scalar(0.0, dtype), features_BHSD)
