"""The attention composite as torch's fused attention wherever the two mean the same, and written out elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.attention import merge_heads, split_heads
from rewriter.graph.operators.composite import attention as written_out
from rewriter.graph.operators.registry import Call, decode

_HIDDEN = -1e30  # an addition from here down leaves nothing of a key, in fp32


class FusedAttention:
    """Runs `Attention` composites while a program is recorded; `depends` says which values are not constants."""

    def __init__(self, depends: Callable[[Tensor | None], bool]) -> None:
        self._depends = depends
        self._masks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Tensor:
        """(B, S, H * Dv) from query, key, value and what may follow them."""
        call = Call(node, decode(node.attributes), 1, None, _no_subgraphs)
        query, key, value = inputs[:3]
        bias, kept, sink = (*inputs[3:], None, None, None)[:3]
        assert query is not None and key is not None and value is not None
        narrow = call.get("precision", "fp32") != "fp32" or query.dtype != torch.float32
        if narrow or kept is not None or sink is not None or call.get("softcap", 0.0):
            result = written_out(call, query, key, value, bias, kept, sink)
            assert isinstance(result, Tensor)
            return result
        return merge_heads(self._fused(call, query, key, value, bias))

    def _fused(self, call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        q, (k, v), grouped = _operand(call, query, "query"), *_key_and_value(call, key, value)
        scale = call.get("scale", 1.0)
        if bias is None:
            return functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        if not self._depends(bias) and _causal(bias, q.shape[-2], k.shape[-2]):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        mask, some = self._mask(bias, q.dtype)
        result = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
        # Torch gives 0 in rows without any key, as these do where the composite says so.
        if call.get("empty_rows", "nan") == "zero":
            return result
        if not self._depends(some) and bool(some.all()):
            return result
        return torch.where(some, result, torch.full((), torch.nan, dtype=result.dtype))

    def _mask(self, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bias as torch takes it, and whether a query may attend to any key; once for all layers that share it."""
        if id(bias) not in self._masks:
            mask = bias if bias.dtype in (torch.bool, dtype) else bias.to(dtype)
            mask = mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))
            allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
            self._masks[id(bias)] = (bias, mask, allowed.any(-1, keepdim=True))
        return self._masks[id(bias)][1:]


def _key_and_value(call: Call, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], bool]:
    """Keys and values by query head, or by group where torch finds the group of each head itself."""
    heads = call.need("heads")
    groups = call.need("key_heads")
    in_turn = [head * groups // heads for head in range(heads)] if heads % groups == 0 else None
    if 1 <= groups < heads and in_turn == call.need("key_head_of") == call.need("value_head_of"):
        return (_split(call, key, "key"), _split(call, value, "value")), True
    return (_operand(call, key, "key"), _operand(call, value, "value")), False


def _split(call: Call, x: Tensor, role: str) -> Tensor:
    return split_heads(x, call.need(f"{role}_heads")) if x.ndim == 3 else x


def _operand(call: Call, x: Tensor, role: str) -> Tensor:
    x, picks = _split(call, x, role), call.need(f"{role}_head_of")
    return x if picks == list(range(call.need(f"{role}_heads"))) else x[:, picks]


def _causal(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether a constant mask hides what comes later and nothing else."""
    if mask.shape[-2:] != (queries, keys) or queries != keys or mask.numel() != queries * keys:
        return False
    square = mask.reshape(queries, keys)
    below = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return torch.equal(square, below)
    return bool((square[below] == 0).all()) and bool((square[~below] <= _HIDDEN).all())


def _no_subgraphs(graph: ir.Graph, env: Any) -> list[Tensor]:
    raise AssertionError("attention holds no graph")
