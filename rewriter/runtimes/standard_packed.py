"""com.microsoft `Attention`: one operator that projects queries, keys and values of one source and attends.

Its kernel multiplies head by head, with the bias of the projection inside, and lays nothing out anew. It needs the
projections, so they are looked for before composites are written out, while they can still be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.graph.composites import is_composite
from rewriter.graph.onnx import constant_of
from rewriter.runtimes.emitter import Emitter
from rewriter.runtimes.shapes import dtype_of
from rewriter.runtimes.standard_operands import AddedBias, Attended, Operand

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class PackedProjection:
    """``source_BSC @ weight_CN + bias_N``, N being all query heads, then all key heads, then all value heads."""

    source: ir.Value
    weight_CN: NDArray[np.float32]
    bias_N: NDArray[np.float32]
    sizes: tuple[int, int, int]


def packed_projection(node: ir.Node) -> PackedProjection | None:
    """What the three operands of an `Attention` composite are projected by, if that is one source and plain products.

    Key and value heads that several query heads read are repeated: the operator has one for each.
    """
    site = Attended.of(node)
    parts = [_projection(x, site.heads) for x in site.operands]
    known = [part for part in parts if part is not None]
    if len(known) < 3 or any(source is not known[0][0] for source, _, _ in known):
        return None
    weights, biases = [weight for _, weight, _ in known], [bias for _, _, bias in known]
    query, key, value = (weight.shape[1] for weight in weights)
    return PackedProjection(known[0][0], np.concatenate(weights, 1), np.concatenate(biases), (query, key, value))


def _projection(x: Operand, heads: int) -> tuple[ir.Value, NDArray[np.float32], NDArray[np.float32]] | None:
    made = x.value.producer()
    if made is None or not is_composite(made, "Linear") or x.rank != 3:
        return None
    attributes = made.attributes
    if attributes.get_string("precision", "fp32") != "fp32" or attributes.get_string("activation", "") != "":
        return None
    source, weight, bias = (*made.inputs, None)[:3]
    matrix = None if weight is None else constant_of(weight)
    if source is None or matrix is None or matrix.dtype != np.float32:
        return None
    vector = np.zeros(matrix.shape[1], np.float32) if bias is None else constant_of(bias)
    if vector is None:
        return None
    return source, _repeated(matrix, x), _repeated(vector[None], x)[0]


def _repeated(matrix: NDArray[np.float32], x: Operand) -> NDArray[np.float32]:
    apart = matrix.reshape(len(matrix), x.heads, -1)
    return np.ascontiguousarray(apart[:, list(x.head_of)].reshape(len(matrix), -1))


def find_packed(nodes: Sequence[ir.Node]) -> dict[int, PackedProjection]:
    """By the id of an `Attention` composite, its projections, where they can be packed."""
    found = {id(node): packed_projection(node) for node in nodes if is_composite(node, "Attention")}
    return {key: packed for key, packed in found.items() if packed is not None}


def fits_packed(e: Emitter, site: Attended) -> bool:
    """It has no cap, and its scale must not be zero, which stands for the usual one."""
    packed = e.packed
    dtype = dtype_of(site.query.value)
    plain = site.kept is None and site.sink is None and not site.softcap and site.scale != 0.0
    return packed is not None and plain and dtype == np.float32 and site.query.tokens == site.key.tokens


def write_packed(e: Emitter, site: Attended) -> ir.Value:
    """The operator, and what rows without a key give."""
    packed = e.packed
    assert packed is not None
    source, only = e.current(packed.source), site.causal == "only"
    bias = AddedBias(None, None, False) if only else AddedBias.of(e, site, source)
    inputs = [source, e.constant(packed.weight_CN), e.constant(packed.bias_N), None, None, bias.value]
    while inputs[-1] is None:
        inputs.pop()
    y = e.op(
        "Attention", *inputs, domain=_DOMAIN, num_heads=site.heads, scale=site.scale, unidirectional=int(only),
        qkv_hidden_sizes=list(packed.sizes),
    )  # fmt: skip
    return bias.restore(e, y, site)
