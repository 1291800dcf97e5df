"""Norms over the full width, scales per head, groups in an axis of their own, einsums, channels first: each lowered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rewriter.attention.recognise import recognise
from rewriter.core.site import AttentionSite, State
from rewriter.graph.onnx import OnnxGraph
from tests.attention.written import DIM, HEADS, SCALE, WIDTH, Net, assert_lowered_is_the_same, attention, softmax

SCALES = np.array([0.3, 1.1, 2.0, 0.5], np.float32)


def wide_norm() -> OnnxGraph:
    """OLMo 2: one norm over all heads of the queries, and one over all of the keys."""
    net = Net()

    def normed() -> str:
        y = net.linear("x")
        square = net.op("ReduceMean", net.op("Mul", y, y), axes=[-1], keepdims=1)
        root = net.op("Sqrt", net.op("Add", square, net.scalar(1e-6)))
        return net.heads(net.op("Mul", net.op("Div", y, root), net.constant(np.linspace(0.5, 2.0, WIDTH))))

    query, key, value = normed(), normed(), net.heads(net.linear("x"))
    mixed = net.op("MatMul", softmax(net, net.op("Add", net.content(query, key), net.hidden())), value)
    return net.finish(net.op("Add", net.linear(net.merged(mixed)), "x"), ("x", "mask"))


def scale_per_head() -> OnnxGraph:
    def scores(net: Net, query: str, key: str) -> str:
        factors = net.constant(SCALES.reshape(1, HEADS, 1, 1))
        return net.op("Add", net.op("Mul", net.content(query, key, 1.0), factors), net.hidden())

    return attention(scores)


def cosines() -> OnnxGraph:
    """Swin v2: unit queries and keys, a learnt scale for every head, a table of positions."""

    def unit(net: Net, y: str) -> str:
        length = net.op("ReduceL2", y, axes=[-1], keepdims=1)
        return net.op("Div", y, net.op("Max", length, net.scalar(1e-12)))

    def scores(net: Net, query: str, key: str) -> str:
        logit = net.op("Exp", net.op("Min", net.constant(SCALES.reshape(HEADS, 1, 1)), net.scalar(4.6)))
        turned = net.op("Transpose", unit(net, key), perm=[0, 1, 3, 2])
        return net.op("Add", net.op("Mul", net.op("MatMul", unit(net, query), turned), logit), net.hidden())

    return attention(scores)


def groups_apart() -> OnnxGraph:
    """Two key heads with two query heads each, in five axes, and a table for each head."""
    net = Net()
    query = net.reshape(net.heads(net.linear("x")), 0, 2, 2, -1, DIM)
    key, value = (net.unsqueeze(net.heads(net.linear("x", WIDTH, 12), 2), 2) for _ in range(2))
    content = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 2, 4, 3]))
    table = net.op("Mul", net.constant(SCALES.reshape(1, 2, 2, 1, 1)), net.unsqueeze(net.hidden(-1.0), 2))
    scores = net.op("Add", net.times(content, SCALE), table)
    mixed = net.op("MatMul", softmax(net, scores), value)
    heads = net.op("Concat", net.shape("x", 0, 1), net.ints(HEADS, -1, DIM), axis=0)
    merged = net.merged(net.op("Reshape", mixed, heads))
    return net.finish(net.op("Add", net.linear(merged), "x"), ("x", "mask"))


def einsums() -> OnnxGraph:
    """Keras: weights and products as einsums with an axis for heads, keys named before queries."""
    net = Net()
    weights = (net.weight(WIDTH, HEADS, DIM) for _ in range(3))
    biases = (net.weight(HEADS, DIM) for _ in range(3))
    query, key, value = (
        net.op("Add", net.op("Einsum", "x", w, equation="abc,cde->abde"), b)
        for w, b in zip(weights, biases, strict=True)
    )
    scores = net.op("Einsum", key, net.times(query, SCALE), equation="aecd,abcd->acbe")
    mixed = net.op("Einsum", softmax(net, net.op("Add", scores, net.hidden())), value, equation="acbe,aecd->abcd")
    out = net.op("Einsum", mixed, net.weight(HEADS, DIM, WIDTH), equation="abcd,cde->abe")
    return net.finish(net.op("Add", net.op("Add", out, net.weight(WIDTH)), "x"), ("x", "mask"))


def channels_first() -> OnnxGraph:
    """Convolutions over one position make queries, keys and values, channels before tokens."""
    net = Net()
    image = net.op("Transpose", "x", perm=[0, 2, 1])

    def projected() -> str:
        return net.reshape(net.op("Conv", image, net.weight(WIDTH, WIDTH, 1), net.weight(WIDTH)), 0, HEADS, DIM, -1)

    query, key, value = (projected() for _ in range(3))
    scores = net.times(net.op("MatMul", net.op("Transpose", query, perm=[0, 1, 3, 2]), key), SCALE)
    weights = softmax(net, net.op("Add", scores, net.hidden()))
    mixed = net.op("MatMul", value, net.op("Transpose", weights, perm=[0, 1, 3, 2]))
    out = net.op("Conv", net.reshape(mixed, 0, WIDTH, -1), net.weight(WIDTH, WIDTH, 1), net.weight(WIDTH))
    return net.finish(net.op("Add", net.op("Transpose", out, perm=[0, 2, 1]), "x"), ("x", "mask"))


def folded() -> OnnxGraph:
    """Batch and heads in one axis, as BLOOM and old TensorFlow code have it."""
    net = Net()
    lengths = net.shape("x", 1, 2)
    flat = net.op("Concat", net.ints(-1), lengths, net.ints(DIM), axis=0)
    query, key, value = (net.op("Reshape", y, flat) for y in net.qkv())
    scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), SCALE)
    apart = net.op("Concat", net.shape("x", 0, 1), net.ints(HEADS), lengths, lengths, axis=0)
    weights = softmax(net, net.op("Add", net.op("Reshape", scores, apart), net.hidden()))
    mixed = net.op(
        "MatMul", net.op("Reshape", weights, net.op("Concat", net.ints(-1), lengths, lengths, axis=0)), value
    )
    back = net.op("Concat", net.shape("x", 0, 1), net.ints(HEADS), lengths, net.ints(DIM), axis=0)
    return net.finish(net.op("Add", net.linear(net.merged(net.op("Reshape", mixed, back))), "x"), ("x", "mask"))


FORMS: dict[str, tuple[Callable[[], OnnxGraph], Callable[[AttentionSite], bool]]] = {
    "wide norm": (wide_norm, lambda s: s.query.norm is not None and s.query.norm.across_heads),
    "scale per head": (scale_per_head, lambda s: s.scale == 1.0),
    "cosines": (cosines, lambda s: s.query.norm is not None and s.query.mapped),
    "groups apart": (groups_apart, lambda s: s.key.head_of == (0, 0, 1, 1) and s.bias.lead == (2, 2)),
    "einsums": (einsums, lambda s: s.query.mapped),
    "channels first": (channels_first, lambda s: s.query.channels_first and s.output is not None),
    "folded": (folded, lambda s: not s.query.opaque),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_lowered(name: str) -> None:
    build, described = FORMS[name]
    graph = build()
    found = recognise(graph)
    (site,) = found.attention
    assert not found.unrecognised
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.qk_dim, site.v_dim) == (4, 6, 6)
    assert described(site)
    assert_lowered_is_the_same(graph, found)
