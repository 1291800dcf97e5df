"""The standard's own ``Attention`` (opset 23), where nobody raised it to a composite: the same template."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.kernels import attention, flash
from rewriter.runtimes.tvm.lowering import Lowering, is_float32
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("Attention")
def _attention(lowering: Lowering, node: Node) -> Any:
    """Without a cache, and with a mask or causality but not both: what exporters write."""
    causal, softcap = bool(node.attributes.get("is_causal", 0)), float(node.attributes.get("softcap", 0.0))
    if any(node.inputs[4:]) or any(node.outputs[1:]):
        raise lowering.unsupported(node, "a cache, or scores as output")
    if (causal or softcap) and node.input(3):
        raise lowering.unsupported(node, "a mask together with causality or softcap")
    if not all(is_float32(lowering, name) for name in node.inputs[:3]):
        raise lowering.unsupported(node, "other than float32")
    query, key, value = _operands(lowering, node)
    groups = tuple(head * key.heads // query.heads for head in range(query.heads))
    bias, mask = _mask(lowering, node, query.shape[-2], key.shape[-2], causal)
    spec = attention.Attention(
        query.shape[0], query.shape[-2], key.shape[-2], query, key, value, tuple(range(query.heads)), groups, groups,
        float(node.attributes.get("scale", query.dim**-0.5)), softcap, bias, "nan", lowering.lanes, lowering.threads,
    )  # fmt: skip
    tile = lowering.tiles.flash(spec)
    kernel = lowering.kernels.get("flash", (spec, tile), lambda unique: flash.make_flash(spec, tile, unique))
    inputs = [*(lowering.value(name) for name in node.inputs[:3]), *([] if mask is None else [mask])]
    result = lowering.builder.emit(
        lowering.call(kernel, inputs, ((spec.B, spec.S, spec.heads * spec.value.dim), "float32"))
    )
    if len(query.shape) == 3:
        return result
    parted = lowering.builder.emit(op.reshape(result, (spec.B, spec.S, spec.heads, spec.value.dim)))
    return op.permute_dims(parted, [0, 2, 1, 3])


def _operands(lowering: Lowering, node: Node) -> tuple[attention.Operand, attention.Operand, attention.Operand]:
    counts = (node.attributes.get("q_num_heads", 0), *[node.attributes.get("kv_num_heads", 0)] * 2)
    query, key, value = (
        attention.Operand.of(lowering.shape(name), int(heads))
        for name, heads in zip(node.inputs[:3], counts, strict=True)
    )
    return query, key, value


def _mask(lowering: Lowering, node: Node, queries: int, keys: int, causal: bool) -> tuple[attention.Bias | None, Any]:
    """The mask as the template takes it. Causality is aligned at the first key, as the standard says."""
    if causal:
        allowed = np.tril(np.ones((1, 1, queries, keys), np.bool_))
        return attention.Bias(allowed.shape, "bool"), lowering.array(allowed)
    name = node.input(3)
    if not name:
        return None, None
    shape = lowering.shape(name)
    wide = (*(1,) * (4 - len(shape)), *shape)
    if wide[-1] not in (1, keys) or wide[-2] not in (1, queries):
        raise lowering.unsupported(node, f"a mask of shape {shape}")
    value = lowering.value(name) if wide == shape else lowering.builder.emit(op.reshape(lowering.value(name), wide))
    if lowering.dtype(name) == "bool":
        return attention.Bias(wide, "bool"), value
    if not is_float32(lowering, name):
        raise lowering.unsupported(node, f"a mask of dtype {lowering.dtype(name)}")
    return attention.Bias(wide), value
