"""Composite operators as the torch calls people write: `F.linear`, `F.scaled_dot_product_attention`, `F.layer_norm`."""

from __future__ import annotations

from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch.nn import functional

from rewriter.core.refusal import Refused
from rewriter.torch_graphs.glue import Scope, attribute, rank_of
from rewriter.torch_graphs.terms import Constant, Tensorlike, Term

_ACTIVATIONS: dict[str, Any] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Weights(Scope, Protocol):
    """A scope that also makes parameters; `causal` says that the bias is nothing but causality from the start."""

    causal: bool

    def weight(self, term: Constant) -> Tensorlike:
        """A weight (C, N) as `F.linear` takes it, (N, C)."""

    def parameter(self, term: Constant) -> Tensorlike:
        """A vector."""


def write_composite(scope: Weights, node: ir.Node, terms: list[Term | None]) -> Tensorlike:
    """One composite; raises `Refused` for number formats, which are torchao's to choose, and sinks."""
    if attribute(node, "precision", "fp32") != "fp32":
        raise Refused("number-format", "number formats are not written into torch graphs; quantise the result")
    if node.op_type == "Attention" and any(term is not None for term in terms[4:]):
        raise Refused("fx-form", "attention with a sink or with replaced scores has no form in fx here")
    given = [term for term in terms if term is not None]
    first = scope.tensor(given[0])
    if node.op_type == "Linear":
        return _linear(scope, node, first, given[1:])
    if node.op_type == "SplitHeads":
        return _split(first, int(attribute(node, "heads")))
    if node.op_type == "Rotary":
        return _rotary(scope, node, first, *(scope.tensor(term) for term in given[1:]))
    if node.op_type == "HeadNorm":
        return _head_norm(scope, node, first, given[1:])
    return _attention(scope, node, [scope.tensor(term) for term in given])


def _linear(scope: Weights, node: ir.Node, x: Tensorlike, terms: list[Term]) -> Tensorlike:
    assert isinstance(terms[0], Constant)
    bias = scope.parameter(terms[1]) if len(terms) > 1 and isinstance(terms[1], Constant) else None
    result = scope.call(functional.linear, x, scope.weight(terms[0]), bias)
    activation = attribute(node, "activation", "") or ""
    if activation in ("", "identity"):
        return result
    if activation == "gelu_tanh":
        return scope.call(functional.gelu, result, approximate="tanh")
    if activation == "quick_gelu":
        return result * scope.call(torch.sigmoid, result * 1.702)
    return scope.call(_ACTIVATIONS[activation], result)


def _split(x: Tensorlike, heads: int) -> Tensorlike:
    """(B, S, N) to (B, heads, S, N / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotary(scope: Weights, node: ir.Node, x: Tensorlike, cos: Tensorlike, sin: Tensorlike) -> Tensorlike:
    size, interleaved = int(attribute(node, "size")), bool(attribute(node, "interleaved", 0))
    value = node.inputs[0]
    assert value is not None
    whole = scope.width(str(value.name)) == size
    turned = x if whole else x[..., :size]
    if interleaved:
        rotated = scope.call(torch.stack, [-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        rotated = scope.call(torch.cat, [-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    around = rotated * sin
    result = turned * cos + around if int(attribute(node, "sign", 1)) > 0 else turned * cos - around
    return result if whole else scope.call(torch.cat, [result, x[..., size:]], -1)


def _head_norm(scope: Weights, node: ir.Node, x: Tensorlike, terms: list[Term]) -> Tensorlike:
    gain, *bias = (scope.parameter(term) for term in terms if isinstance(term, Constant))
    value = node.inputs[0]
    assert value is not None
    width, epsilon = (scope.width(str(value.name)),), float(attribute(node, "epsilon", 1e-5))
    if attribute(node, "kind", "layer") == "layer":
        return scope.call(functional.layer_norm, x, width, gain, bias[0] if bias else None, epsilon)
    result = scope.call(functional.rms_norm, x, width, gain, epsilon)
    return result + bias[0] if bias else result


def _attention(scope: Weights, node: ir.Node, tensors: list[Tensorlike]) -> Tensorlike:
    """`F.scaled_dot_product_attention`, unless a soft-cap bends the scores; the result is (B, S, H * Dv).

    A query without any allowed key gives 0, as in torch, also where an explicit softmax gave NaN.
    """
    roles = ("query", "key", "value")
    query, key, value = (
        _heads(node, x, role, rank_of(scope, node, i))
        for i, (x, role) in enumerate(zip(tensors[:3], roles, strict=True))
    )
    bias = tensors[3] if len(tensors) > 3 and not scope.causal else None
    scale, softcap = float(attribute(node, "scale", 1.0)), float(attribute(node, "softcap", 0.0))
    if not softcap:
        mask = {"is_causal": True} if scope.causal else {} if bias is None else {"attn_mask": bias}
        mixed = scope.call(functional.scaled_dot_product_attention, query, key, value, **mask, scale=scale)
        return mixed.transpose(1, 2).flatten(2)
    scores = scope.call(torch.tanh, (query @ key.transpose(-1, -2)) * (scale / softcap)) * softcap
    if len(tensors) > 3:
        kind = attribute(node, "bias_kind", "add")
        hidden = tensors[3]
        scores = (
            scores.masked_fill(scope.call(torch.logical_not, hidden), -torch.inf) if kind == "bool" else scores + hidden
        )
    weights = scope.call(torch.softmax, scores, -1)
    if len(tensors) > 3 and attribute(node, "empty_rows", "nan") == "zero":
        weights = scope.call(torch.where, scope.call(torch.isnan, weights), 0.0, weights)
    return (weights @ value).transpose(1, 2).flatten(2)


def _heads(node: ir.Node, x: Tensorlike, role: str, rank: int) -> Tensorlike:
    """(B, H, tokens, D): heads split, then repeated or picked for every query head."""
    groups, picks = int(attribute(node, f"{role}_heads")), [int(p) for p in attribute(node, f"{role}_head_of")]
    x = _split(x, groups) if rank == 3 else x
    if picks == list(range(groups)):
        return x
    times = len(picks) // groups
    if picks == [group for group in range(groups) for _ in range(times)]:
        return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
    return x[:, picks]
