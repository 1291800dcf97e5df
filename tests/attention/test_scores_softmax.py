"""A softmax is what it does, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import OnnxGraph
from tests.attention.written import SCALE, Net, Softmax, assert_lowered_is_the_same, attention


def shared(net: Net, exponentials: str) -> str:
    return net.op("Div", exponentials, net.total(exponentials))


def below_maximum(net: Net, scores: str) -> str:
    return net.op("Sub", scores, net.op("ReduceMax", scores, axes=[-1], keepdims=1))


def by_norm(net: Net, scores: str) -> str:
    raised = net.op("Exp", scores)
    return net.op("Div", raised, net.op("ReduceL1", raised, axes=[-1], keepdims=1))


def by_reciprocal(net: Net, scores: str) -> str:
    raised = net.op("Exp", scores)
    return net.op("Mul", raised, net.op("Reciprocal", net.total(raised)))


def with_floor(net: Net, scores: str) -> str:
    raised = net.op("Exp", scores)
    return net.op("Div", raised, net.op("Max", net.total(raised), net.scalar(1e-12)))


def by_logarithm(net: Net, scores: str) -> str:
    return net.op("Exp", net.op("Sub", scores, net.op("ReduceLogSumExp", scores, axes=[-1], keepdims=1)))


def merged_rows(axes: int, **attributes: int) -> Softmax:
    """Softmax over scores of `axes` axes: the semantics of opset 12 and below."""

    def written(net: Net, scores: str) -> str:
        kept = net.op("Concat", net.ints(-1), net.shape(scores, 5 - axes, 4), axis=0)
        flat = net.op("Softmax", net.op("Reshape", scores, kept), **attributes)
        return net.op("Reshape", flat, net.op("Shape", scores))

    return written


FORMS: dict[str, tuple[int, Softmax]] = {
    "exponentials": (17, lambda n, s: shared(n, n.op("Exp", s))),
    "below the maximum": (17, lambda n, s: shared(n, n.op("Exp", below_maximum(n, s)))),
    "over the norm": (17, by_norm),
    "times a reciprocal": (17, by_reciprocal),
    "with a floor": (17, with_floor),
    "exponential of a logarithm": (17, lambda n, s: n.op("Exp", n.op("LogSoftmax", s, axis=-1))),
    "less the logarithm of the sum": (17, by_logarithm),
    "maximum twice": (17, lambda n, s: n.op("Softmax", below_maximum(n, s), axis=-1)),
    "rows merged": (17, merged_rows(2, axis=1)),
    "opset 12, last axis": (12, lambda n, s: n.op("Softmax", s, axis=3)),
    "opset 12, three axes": (12, merged_rows(3, axis=2)),
    "opset 12, two axes": (12, merged_rows(2, axis=1)),
    "opset 12, the axis left out": (12, merged_rows(2)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_softmax_is_one(name: str) -> None:
    opset, form = FORMS[name]
    graph = attention(probabilities=form, opset=opset, masked=False)
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert not found.unrecognised
    assert site.scale == pytest.approx(SCALE, rel=1e-6)
    assert_lowered_is_the_same(graph, found)


def keys_first(net: Net, scores_of: Callable[[Net, str, str], str], axis: int) -> OnnxGraph:
    """Keys times queries; the softmax runs over `axis`, the second from the end or the last after a transposition."""
    query, key, value = net.qkv()
    scores = scores_of(net, key, query)
    if axis == 3:
        scores = net.op("Add", net.op("Transpose", scores, perm=[0, 1, 3, 2]), net.hidden())
        mixed = net.op("MatMul", net.op("Softmax", scores, axis=3), value)
    else:
        scores = net.op("Add", scores, net.op("Transpose", net.hidden(), perm=[0, 1, 3, 2]))
        turned = net.op("Transpose", value, perm=[0, 1, 3, 2])
        mixed = net.op("Transpose", net.op("MatMul", turned, net.op("Softmax", scores, axis=2)), perm=[0, 1, 3, 2])
    return net.finish(net.op("Add", net.linear(net.merged(mixed)), "x"), ("x", "mask"))


@pytest.mark.parametrize("axis", [2, 3])
def test_keys_may_come_before_queries(axis: int) -> None:
    graph = keys_first(Net(), Net.content, axis)
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.mask, site.heads, site.qk_dim) == ("padding", 4, 6)
    assert_lowered_is_the_same(graph, found)


def test_a_softmax_over_heads_is_named() -> None:
    found = recognise(attention(probabilities=lambda n, s: n.op("Softmax", s, axis=1), masked=False))
    (site,) = found.attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["probabilities-changed"]


def test_sums_taken_after_the_values_are_named() -> None:
    net = Net()
    query, key, value = net.qkv()
    raised = net.op("Exp", net.content(query, key))
    mixed = net.op("Div", net.op("MatMul", raised, value), net.total(raised))
    (site,) = recognise(net.finish(net.op("Add", net.linear(net.merged(mixed)), "x"))).attention
    assert site.state is not State.LOWERABLE
    assert site.problems[0].code == "probabilities-changed"


@pytest.mark.parametrize("name", ["Sigmoid", "Relu"])
def test_attention_without_a_softmax_is_mapped(name: str) -> None:
    (site,) = recognise(attention(probabilities=lambda n, s: n.op(name, s), masked=False)).attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["no-softmax"]
