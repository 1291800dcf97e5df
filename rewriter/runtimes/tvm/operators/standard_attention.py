"""The standard's own ``Attention`` (opset 23), where nobody raised it to a composite: the same template."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from rewriter.runtimes.tvm.kernels import attention
from rewriter.runtimes.tvm.lowering import Lowering, is_float32
from rewriter.runtimes.tvm.operators.attention_call import attend
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("Attention")
def _attention(lowering: Lowering, node: Node) -> Any:
    """With masks, causality, windows and a cache of past keys and values, in any combination."""
    if node.input(6) or lowering.wants(node, 3):
        raise lowering.unsupported(node, "lengths of keys, or scores as output")
    if not all(is_float32(lowering, name) for name in node.inputs[:3]):
        raise lowering.unsupported(node, "other than float32")
    softcap = float(node.attributes.get("softcap", 0.0))
    values = [lowering.value(name) for name in node.inputs[:3]]
    counts = (node.attributes.get("q_num_heads", 0), *[node.attributes.get("kv_num_heads", 0)] * 2)
    shapes = [lowering.shape(name) for name in node.inputs[:3]]
    past, present = 0, []
    if node.input(4) or lowering.wants(node, 1, 2):
        past, values, shapes = _with_past(lowering, node, values, shapes, int(counts[1]))
        present = values[1:]
    query, key, value = (attention.Operand.of(shape, int(heads)) for shape, heads in zip(shapes, counts, strict=True))
    groups = tuple(head * key.heads // query.heads for head in range(query.heads))
    bias, mask = _mask(lowering, node, query.shape[-2], key.shape[-2], past)
    spec = attention.Attention(
        query.shape[0], query.shape[-2], key.shape[-2], query, key, value, tuple(range(query.heads)), groups, groups,
        float(node.attributes.get("scale", query.dim**-0.5)), softcap, bias, "zero", lowering.lanes, lowering.threads,
    )  # fmt: skip
    result = lowering.builder.emit(attend(lowering, spec, [*values, *([] if mask is None else [mask])]))
    if len(query.shape) == 4:
        parted = lowering.builder.emit(op.reshape(result, (spec.B, spec.S, spec.heads, spec.value.dim)))
        result = lowering.builder.emit(op.permute_dims(parted, [0, 2, 1, 3]))
    return [result, *present]


def _with_past(
    lowering: Lowering, node: Node, values: list[Any], shapes: list[tuple[int, ...]], heads: int
) -> tuple[int, list[Any], list[tuple[int, ...]]]:
    """(length of the past, operands, their shapes), keys and values as (B, heads, past + new, dim)."""
    emit, values, shapes, past = lowering.builder.emit, list(values), list(shapes), 0
    for index in (1, 2):
        shape = shapes[index]
        if len(shape) == 3:
            parted = emit(op.reshape(values[index], (*shape[:2], heads, shape[2] // heads)))
            values[index] = emit(op.permute_dims(parted, [0, 2, 1, 3]))
            shape = (shape[0], heads, shape[1], shape[2] // heads)
        name = node.input(index + 3)
        if name:
            past = lowering.shape(name)[2]
            values[index] = emit(op.concat([lowering.value(name), values[index]], 2))
            shape = (*shape[:2], shape[2] + past, shape[3])
        shapes[index] = shape
    return past, values, shapes


def _mask(lowering: Lowering, node: Node, queries: int, keys: int, past: int) -> tuple[attention.Bias | None, Any]:
    """The mask as the template takes it, joined with what causality and windows hide."""
    seen = _seen(node, queries, keys, past)
    name = node.input(3)
    if not name:
        return (None, None) if seen is None else (attention.Bias(seen.shape, "bool"), lowering.array(seen))
    shape, emit = lowering.shape(name), lowering.builder.emit
    wide = (*(1,) * (4 - len(shape)), *shape)
    if wide[-1] not in (1, keys) or wide[-2] not in (1, queries):
        raise lowering.unsupported(node, f"a mask of shape {shape}")
    value = lowering.value(name) if wide == shape else emit(op.reshape(lowering.value(name), wide))
    whole = (*wide[:2], queries, keys)
    if lowering.dtype(name) == "bool":
        if seen is None:
            return attention.Bias(wide, "bool"), value
        return attention.Bias(whole, "bool"), emit(op.logical_and(value, lowering.array(seen)))
    if not is_float32(lowering, name):
        raise lowering.unsupported(node, f"a mask of dtype {lowering.dtype(name)}")
    if seen is None:
        return attention.Bias(wide), value
    hidden = np.where(seen, 0.0, -np.inf).astype(np.float32)
    return attention.Bias(whole), emit(op.add(value, lowering.array(hidden)))


def _seen(node: Node, queries: int, keys: int, past: int) -> NDArray[np.bool_] | None:
    """(1, 1, S, T): what causality, aligned at the first key behind the past, and windows leave; None for all."""
    distance = np.arange(keys) - (np.arange(queries)[:, None] + past)
    left, right = (int(node.attributes.get(f"{side}_window_size", -1)) for side in ("left", "right"))
    seen = np.ones((queries, keys), np.bool_)
    if int(node.attributes.get("is_causal", 0)):
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return None if seen.all() else seen[None, None]
