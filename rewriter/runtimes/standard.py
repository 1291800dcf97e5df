"""Composites written out in standard ONNX, at the opset the graph has.

This is what `model.onnx` holds and what runtimes other than ours read. Batch and lengths stay dynamic: reshapes copy
those axes (0) and name only heads and dims, which are constants of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from rewriter.core.errors import UnsupportedOperator
from rewriter.core.forms import ATTENTION, ATTENTION_OPSET, DECOMPOSED, PACKED, picked
from rewriter.graph.composites import COMPOSITE_DOMAIN, is_composite
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.opset import at_least
from rewriter.runtimes.emitter import Emitter, Names, Shared
from rewriter.runtimes.shapes import declare, dtype_of, sizes_of
from rewriter.runtimes.standard_attention import attention
from rewriter.runtimes.standard_operands import split_heads
from rewriter.runtimes.standard_packed import find_packed
from rewriter.runtimes.standard_precision import rounded_product

AS_CHOSEN = "as chosen"
_MICROSOFT = "com.microsoft"


def to_standard(graph: OnnxGraph, form: str = DECOMPOSED) -> OnnxGraph:
    """A copy of `graph` without composites. The input is not changed; names of inputs and outputs stay.

    With a `form` of `rewriter.core.forms` attentions become one operator where it means the same, others are written
    out; `AS_CHOSEN` takes the form that each site says. ONNX `Attention` needs opset 23: a graph of a lower one is
    written at that where a site says so, while a mere `form` leaves the opset. Raises `UnsupportedOperator` for a
    composite that is not known, and for an operator that is another one in opset 23.
    """
    graph = at_least(graph, ATTENTION_OPSET) if form == AS_CHOSEN and _says(graph, ATTENTION) else graph
    result = graph.clone()
    names, shared = Names(result.model), Shared()
    for part in list(result.model.graphs()):
        composites = [node for node in part if node.domain == COMPOSITE_DOMAIN]
        for node in composites:
            # While the composites stand, it is plain how many axes each value has.
            declare(node.outputs[0])
        shared.packed |= find_packed(composites) if form in (PACKED, AS_CHOSEN) else {}
        for node in composites:
            emitter = Emitter(node, graph.opset, names, shared)
            reads = [value for value in node.inputs if value is not None]
            emitter.replace(_expand(emitter, form))
            _drop_idle(part, reads)
        part.opset_imports.pop(COMPOSITE_DOMAIN, None)
    result.model.opset_imports.pop(COMPOSITE_DOMAIN, None)
    if any(node.domain == _MICROSOFT for node in result.model.graph.all_nodes()):
        result.model.opset_imports.setdefault(_MICROSOFT, 1)
    if shared.packed:
        RemoveUnusedNodesPass()(result.model)  # projections that became part of an operator
    return OnnxGraph(result.model, graph.path)


def with_some_written_out(graph: OnnxGraph, runtime: str) -> OnnxGraph:
    """The graph with the attentions written out whose form under `runtime` is ``decomposed``; the rest stays.

    The graph itself where there are none.
    """
    if not _says(graph, DECOMPOSED, runtime):
        return graph
    result = graph.clone()
    names, shared = Names(result.model), Shared()
    for part in list(result.model.graphs()):
        for node in [node for node in part if is_composite(node)]:
            declare(node.outputs[0])
        for node in [node for node in part if is_composite(node, "Attention")]:
            if _chosen(node, runtime) == DECOMPOSED:
                emitter = Emitter(node, graph.opset, names, shared)
                emitter.replace(attention(emitter, DECOMPOSED))
    return OnnxGraph(result.model, graph.path)


def _says(graph: OnnxGraph, form: str, runtime: str = "onnxruntime") -> bool:
    nodes = (node for node in graph.model.graph.all_nodes() if is_composite(node, "Attention"))
    return any(_chosen(node, runtime) == form for node in nodes)


def _chosen(node: ir.Node, runtime: str = "onnxruntime") -> str:
    return picked(node.attributes.get_strings("forms", ()), runtime)


def _drop_idle(part: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Initialisers that the composite alone read go: what was written out holds them in another form."""
    for value in values:
        name = value.name or ""
        idle = not value.uses() and not value.is_graph_input() and not value.is_graph_output()
        if idle and part.initializers.get(name) is value:
            part.initializers.pop(name)


def _expand(emitter: Emitter, form: str) -> ir.Value:
    kind = emitter.node.op_type
    if kind == "Attention":
        return attention(emitter, _chosen(emitter.node) if form == AS_CHOSEN else form)
    if kind not in _EXPANSIONS:
        raise UnsupportedOperator("the standard form", f"{COMPOSITE_DOMAIN}::{kind}", emitter.node.name or "")
    return _EXPANSIONS[kind](emitter)


def _operands(emitter: Emitter) -> tuple[ir.Value | None, ...]:
    return (*emitter.node.inputs, None, None, None)


def _linear(emitter: Emitter) -> ir.Value:
    """``act(x @ W + b)``, as `Gemm` where x is known to be a matrix and there is a bias."""
    x, weight_CN, bias_N = _operands(emitter)[:3]
    assert x is not None and weight_CN is not None
    precision = emitter.node.attributes.get_string("precision", "fp32")
    if precision != "fp32":
        y = rounded_product(emitter, x, weight_CN, precision, dtype_of(weight_CN))
        y = y if bias_N is None else emitter.op("Add", y, bias_N)
    elif bias_N is not None and x.shape is not None and len(x.shape) == 2:
        y = emitter.op("Gemm", x, weight_CN, bias_N)
    else:
        y = emitter.op("MatMul", x, weight_CN)
        y = y if bias_N is None else emitter.op("Add", y, bias_N)
    name = emitter.node.attributes.get_string("activation", "")
    if name in ("", "identity"):
        return y
    if name not in _ACTIVATIONS:
        raise UnsupportedOperator("the standard form", f"activation {name}", emitter.node.name or "")
    return _ACTIVATIONS[name](emitter, y, dtype_of(weight_CN))


def _gelu(e: Emitter, x: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """``x/2 (1 + erf(x / sqrt 2))``, in the order of operations that runtimes recognise."""
    if e.opset >= 20:
        return e.op("Gelu", x, approximate="none")
    erf = e.op("Erf", e.op("Div", x, e.scalar(math.sqrt(2.0), dtype)))
    return e.op("Mul", e.op("Mul", x, e.op("Add", erf, e.scalar(1.0, dtype))), e.scalar(0.5, dtype))


def _gelu_tanh(e: Emitter, x: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` (Hendrycks & Gimpel 2016)."""
    if e.opset >= 20:
        return e.op("Gelu", x, approximate="tanh")
    cube = e.op("Mul", e.op("Mul", e.op("Mul", x, x), x), e.scalar(0.044715, dtype))
    tanh = e.op("Tanh", e.op("Mul", e.op("Add", x, cube), e.scalar(math.sqrt(2.0 / math.pi), dtype)))
    return e.op("Mul", e.op("Mul", x, e.op("Add", tanh, e.scalar(1.0, dtype))), e.scalar(0.5, dtype))


def _quick_gelu(e: Emitter, x: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    return e.op("Mul", x, e.op("Sigmoid", e.op("Mul", x, e.scalar(1.702, dtype))))


_ACTIVATIONS: dict[str, Callable[[Emitter, ir.Value, np.dtype[Any]], ir.Value]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": lambda e, x, _: e.op("Relu", x),
    "silu": lambda e, x, _: e.op("Mul", x, e.op("Sigmoid", x)),
    "tanh": lambda e, x, _: e.op("Tanh", x),
}


def _head_norm(emitter: Emitter) -> ir.Value:
    """Layer norm or RMS norm over the last axis; the operator where the opset has it."""
    x, gain, bias = _operands(emitter)[:3]
    assert x is not None and gain is not None
    kind = emitter.node.attributes.get_string("kind", "layer")
    epsilon = emitter.node.attributes.get_float("epsilon", 1e-5)
    if kind == "layer" and emitter.opset >= 17:
        return emitter.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=epsilon)
    if kind == "rms" and emitter.opset >= 23:
        y = emitter.op("RMSNormalization", x, gain, axis=-1, epsilon=epsilon)
    else:
        y = emitter.op("Mul", _normalised(emitter, x, kind, epsilon, dtype_of(gain)), gain)
    return y if bias is None else emitter.op("Add", y, bias)


def _normalised(e: Emitter, x: ir.Value, kind: str, epsilon: float, dtype: np.dtype[Any]) -> ir.Value:
    # The operators compute in float32 whatever they are given (stash_type 1), and half precision needs it.
    narrow = dtype.itemsize < 4
    wide = e.op("Cast", x, to=int(ir.DataType.FLOAT)) if narrow else x
    precision = np.dtype(np.float32) if narrow else dtype
    if kind == "layer":
        wide = e.op("Sub", wide, e.mean(wide))
    spread = e.op("Add", e.mean(e.op("Mul", wide, wide)), e.scalar(epsilon, precision))
    y = e.op("Div", wide, e.op("Sqrt", spread))
    return e.op("Cast", y, to=int(ir.DataType.from_numpy(dtype))) if narrow else y


def _rotary(e: Emitter) -> ir.Value:
    """``u * cos + sign * rotate(u) * sin`` on the leading `size` dims of each head (Su et al. 2021)."""
    x, cos, sin = _operands(e)[:3]
    assert x is not None and cos is not None and sin is not None
    attributes = e.node.attributes
    size, interleaved = attributes.get_int("size", 0), bool(attributes.get_int("interleaved", 0))
    whole = sizes_of(x, 4)[-1] == size
    turned = x if whole else e.cut(x, 0, size)
    if interleaved:
        pair = (e.op("Neg", e.cut(turned, 1, size, 2)), e.cut(turned, 0, size, 2))
        paired = e.op("Concat", *(e.unsqueeze(half, -1) for half in pair), axis=-1)
        rotated = e.op("Reshape", paired, e.ints(0, 0, 0, size))
    else:
        halves = e.op("Neg", e.cut(turned, size // 2, size)), e.cut(turned, 0, size // 2)
        rotated = e.op("Concat", *halves, axis=-1)
    combine = "Add" if attributes.get_int("sign", 1) > 0 else "Sub"
    y = e.op(combine, e.op("Mul", turned, cos), e.op("Mul", rotated, sin))
    return y if whole else e.op("Concat", y, e.cut(x, size), axis=-1)


_EXPANSIONS: dict[str, Callable[[Emitter], ir.Value]] = {
    "Linear": _linear,
    "SplitHeads": split_heads,
    "HeadNorm": _head_norm,
    "Rotary": _rotary,
}
