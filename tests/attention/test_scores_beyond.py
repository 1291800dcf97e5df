"""What the softmax holds beside its keys, what mixes heads, and scores that are no function of the content alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from passes.exact_cleanup import key_bias_refusal, value_bias_refusal
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import OnnxGraph
from tests.attention.written import HEADS, WIDTH, Net, Softmax, assert_lowered_is_the_same, attention, softmax

LOGITS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


def column(net: Net, scores: str, logits: str) -> str:
    shape = net.op("Concat", net.shape(scores, 0, 3), net.ints(1), axis=0)
    return net.op("Expand", logits, shape)


def dropped(net: Net, weights: str) -> str:
    return net.op("Slice", weights, net.ints(0), net.ints(-1), net.ints(3))


def sink(net: Net, scores: str) -> str:
    logits = net.constant(LOGITS.reshape(1, HEADS, 1, 1))
    return dropped(net, softmax(net, net.op("Concat", scores, column(net, scores, logits), axis=-1)))


def sink_below_maximum(net: Net, scores: str) -> str:
    """As gpt-oss writes it."""
    logits = net.constant(LOGITS.reshape(1, HEADS, 1, 1))
    joined = net.op("Concat", scores, column(net, scores, logits), axis=-1)
    return dropped(net, softmax(net, net.op("Sub", joined, net.op("ReduceMax", joined, axes=[-1], keepdims=1))))


def one_more(net: Net, scores: str) -> str:
    raised = net.op("Exp", scores)
    return net.op("Div", raised, net.op("Add", net.total(raised), net.scalar(1.0)))


def one_more_below_maximum(net: Net, scores: str) -> str:
    top = net.op("Max", net.op("ReduceMax", scores, axes=[-1], keepdims=1), net.scalar(0.0))
    raised = net.op("Exp", net.op("Sub", scores, top))
    return net.op("Div", raised, net.op("Add", net.total(raised), net.op("Exp", net.op("Neg", top))))


def padded(net: Net, scores: str) -> str:
    return dropped(net, softmax(net, net.op("Pad", scores, net.ints(0, 0, 0, 0, 0, 0, 0, 1), net.scalar(0.0))))


SINKS: dict[str, tuple[Softmax, np.ndarray]] = {
    "sink": (sink, LOGITS),
    "sink below the maximum": (sink_below_maximum, LOGITS),
    "one more": (one_more, np.zeros(HEADS)),
    "one more, below the maximum": (one_more_below_maximum, np.zeros(HEADS)),
    "one more, padded": (padded, np.zeros(HEADS)),
}


def with_sink(name: str) -> OnnxGraph:
    return attention(lambda n, q, k: n.op("Add", n.content(q, k), n.hidden()), SINKS[name][0])


@pytest.mark.parametrize("name", SINKS)
def test_sinks_are_lowered(name: str) -> None:
    graph = with_sink(name)
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert site.sink_H is not None
    assert np.array_equal(site.sink_H, SINKS[name][1])
    assert np.array_equal(site.keep_heads((1, 3)).sink_H, SINKS[name][1][[1, 3]])
    assert {r.code for r in (key_bias_refusal(site), value_bias_refusal(site)) if r} == {"not-all-scores", "sink"}
    assert_lowered_is_the_same(graph, found)


def test_a_sink_that_depends_on_the_query_is_mapped() -> None:
    def written(net: Net, scores: str) -> str:
        logits = net.unsqueeze(net.op("Transpose", net.linear("x", WIDTH, HEADS), perm=[0, 2, 1]), -1)
        return dropped(net, softmax(net, net.op("Concat", scores, logits, axis=-1)))

    (site,) = recognise(attention(probabilities=written, masked=False)).attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["sink-per-token"]


def mixed(net: Net, x: str) -> str:
    return net.op("Einsum", x, net.weight(HEADS, HEADS), equation="bhqk,hg->bgqk")


def mixed_by_product(net: Net, x: str) -> str:
    last = net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.weight(HEADS, HEADS))
    return net.op("Transpose", last, perm=[0, 3, 1, 2])


def mixed_by_convolution(net: Net, x: str) -> str:
    return net.op("Conv", x, net.weight(HEADS, HEADS, 1, 1))


@pytest.mark.parametrize("mix", [mixed, mixed_by_product, mixed_by_convolution])
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_heads_that_are_mixed_are_found(mix: Softmax, where: str) -> None:
    def written(net: Net, scores: str) -> str:
        weights = softmax(net, scores if where == "after" else mix(net, scores))
        return weights if where == "before" else mix(net, weights)

    found = recognise(attention(probabilities=written, masked=False))
    (site,) = found.attention
    assert not found.unrecognised
    assert site.state is State.FOUND
    assert (site.heads, site.qk_dim, site.v_dim) == (4, 6, 6)
    assert [problem.code for problem in site.problems] == ["head-mixing"]


def gates(net: Net, perm: list[int]) -> str:
    return net.op("Sigmoid", net.op("Transpose", net.linear("x", WIDTH, HEADS), perm=perm))


def kept_largest(net: Net, scores: str) -> str:
    largest = net.op("TopK", scores, net.ints(2), outputs=2)[0]
    least = net.op("Slice", largest, net.ints(1), net.ints(2), net.ints(3))
    return net.op("Where", net.op("Less", scores, least), net.scalar(-1e4), scores)


OTHER: dict[str, Callable[[Net, str], str]] = {
    "a scale by query": lambda n, s: n.op("Mul", s, n.unsqueeze(gates(n, [0, 2, 1]), -1)),
    "a scale by key": lambda n, s: n.op("Mul", s, n.unsqueeze(gates(n, [0, 2, 1]), 2)),
    "the largest alone": kept_largest,
}


@pytest.mark.parametrize("name", OTHER)
def test_other_score_functions_are_mapped(name: str) -> None:
    found = recognise(attention(lambda n, q, k: OTHER[name](n, n.content(q, k)), masked=False))
    (site,) = found.attention
    assert not found.unrecognised
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["unknown-score-function"]


def test_a_scale_that_grows_with_the_length_is_noticed() -> None:
    def scores(net: Net, query: str, key: str) -> str:
        length = net.op("Cast", net.shape(query, 2, 3), to=1)
        return net.op("Mul", net.content(query, key), net.op("Log", length))

    (site,) = recognise(attention(scores, masked=False)).attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["identity-under-masks"]


def after(net: Net, what: str, x: str) -> str:
    if what == "norm":
        return net.op("LayerNormalization", x, net.weight(WIDTH), net.weight(WIDTH), axis=-1)
    if what == "gate":
        return net.op("Mul", x, net.op("Sigmoid", net.linear("x")))
    return net.op("Add", x, "x")


@pytest.mark.parametrize("what", ["norm", "gate", "sum"])
def test_what_comes_after_the_values_stays_outside(what: str) -> None:
    graph = attention(after=lambda n, x: after(n, what, x), masked=False)
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert_lowered_is_the_same(graph, found)
