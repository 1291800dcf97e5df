"""Heads in a loop: a softmax each, joined in the end. One attention with all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.composites import is_composite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from tests.attention.written import DIM, HEADS, SCALE, WIDTH, Net, assert_lowered_is_the_same, feeds_of, softmax

Parts = list[tuple[str, str, str]]


def split(net: Net) -> Parts:
    sizes = net.ints(*[DIM] * HEADS)
    wide = (net.op("Split", net.linear("x"), sizes, axis=2, outputs=HEADS) for _ in range(3))
    return list(zip(*wide, strict=True))


def sliced(net: Net) -> Parts:
    wide = [net.linear("x") for _ in range(3)]
    bounds = [(net.ints(DIM * h), net.ints(DIM * (h + 1))) for h in (2, 0, 3, 1)]
    parts = [[net.op("Slice", y, start, end, net.ints(2)) for y in wide] for start, end in bounds]
    return [(query, key, value) for query, key, value in parts]


def gathered(net: Net) -> Parts:
    wide = net.qkv()
    parts = [[net.op("Gather", y, net.constant(h, np.int64), axis=1) for y in wide] for h in range(HEADS)]
    return [(query, key, value) for query, key, value in parts]


def separate(net: Net) -> Parts:
    parts = [[net.linear("x", WIDTH, DIM) for _ in range(3)] for _ in range(HEADS)]
    return [(query, key, value) for query, key, value in parts]


def shared_keys(net: Net) -> Parts:
    key, value = net.linear("x", WIDTH, DIM), net.linear("x", WIDTH, DIM)
    return [(net.linear("x", WIDTH, DIM), key, value) for _ in range(HEADS)]


PARTS = {
    "split": split,
    "sliced": sliced,
    "gathered": gathered,
    "separate": separate,
    "shared keys": shared_keys,
}


def looped(name: str, masks: str = "", stacked: bool = False, opset: int = 17) -> OnnxGraph:
    """`masks`: one for all ("shared"), one for each head ("own"), or none; `stacked` joins heads in a new axis."""
    net, joined = Net(opset), []
    parts = PARTS[name](net)
    hidden = net.op("Squeeze", net.hidden(), net.ints(1)) if masks == "shared" else ""
    for query, key, value in parts:
        scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), SCALE)
        own = net.op("Squeeze", net.hidden(), net.ints(1)) if masks == "own" else hidden
        joined.append(net.op("MatMul", softmax(net, net.op("Add", scores, own) if own else scores), value))
    if stacked:
        context = net.merged(net.op("Concat", *(net.unsqueeze(one, 1) for one in joined), axis=1))
    else:
        context = net.op("Concat", *joined, axis=2)
    return net.finish(net.op("Add", net.linear(context), "x"), ("x", "mask") if masks else ("x",))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("masks", ["", "shared", "own"])
def test_heads_in_a_loop_are_one_attention(name: str, masks: str) -> None:
    graph = looped(name, masks, stacked=name == "gathered")
    found = recognise(graph)
    (site,) = found.attention
    assert not found.unrecognised
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.kv_heads, site.qk_dim) == (4, 1 if name == "shared keys" else 4, 6)
    assert site.mask == ("padding" if masks else "none")
    assert site.bias.heads_axis == (4 if masks == "own" else 1)
    lowered = assert_lowered_is_the_same(graph, found)
    kinds = [node.op_type for node in lowered.topological()]
    assert sum(is_composite(node, "Attention") for node in lowered.topological()) == 1
    assert "Softmax" not in kinds


def test_large_weights_of_a_loop_are_the_models_own() -> None:
    """From 65536 numbers on weights are drawn while a graph is looked at."""
    width, dim, net = 512, 128, Net()
    x = net.op("MatMul", "x", net.weight(WIDTH, width))
    parts = [[net.linear(x, width, dim) for _ in range(3)] for _ in range(HEADS)]
    joined = []
    for query, key, value in parts:
        scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), dim**-0.5)
        joined.append(net.op("MatMul", softmax(net, scores), value))
    graph = net.finish(net.linear(net.op("Concat", *joined, axis=2), width, width))
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    names = site.query.weight_name.split()
    assert len(names) == HEADS
    assert site.query.weight_CGD is not None
    for head, name in enumerate(names):
        assert np.array_equal(site.query.weight_CGD[:, head], graph.constant(name))
    assert_lowered_is_the_same(graph, found)


def test_a_head_of_a_loop_can_be_removed() -> None:
    graph = looped("separate")
    (site,) = recognise(graph).attention
    assert site.output is not None
    weight_HDC = site.output.weight_HDC.copy()
    weight_HDC[1] = 0
    zeroed = replace(site, output=replace(site.output, weight_HDC=weight_HDC))
    smaller, feeds = lower(graph, [site.keep_heads((0, 2, 3))]), feeds_of(graph)
    assert smaller.constant(f"{site.id}/query.weight").shape == (WIDTH, 3 * DIM)
    expected = Interpreter(lower(graph, [zeroed])).run(feeds)["output"].numpy()
    np.testing.assert_allclose(Interpreter(smaller).run(feeds)["output"].numpy(), expected, atol=1e-5)


def test_heads_with_different_scales_are_one_attention() -> None:
    net, joined = Net(), []
    for head, (query, key, value) in enumerate(separate(net)):
        scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), 0.2 + 0.1 * head)
        joined.append(net.op("MatMul", softmax(net, scores), value))
    graph = net.finish(net.op("Add", net.linear(net.op("Concat", *joined, axis=2)), "x"))
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert_lowered_is_the_same(graph, found)


def test_a_loop_with_unlike_heads_stays_apart() -> None:
    net, joined = Net(), []
    for head, (query, key, value) in enumerate(separate(net)):
        scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1]))
        scores = net.op("Tanh", scores) if head == 1 else scores
        joined.append(net.op("MatMul", softmax(net, scores), value))
    graph = net.finish(net.op("Add", net.linear(net.op("Concat", *joined, axis=2)), "x"))
    found = recognise(graph)
    assert [site.heads for site in found.attention] == [1, 1, 1, 1]
    assert not found.unrecognised


def test_heads_whose_outputs_are_added_are_attentions_of_their_own() -> None:
    net, total = Net(), "x"
    for query, key, value in separate(net):
        scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), SCALE)
        mixed = net.op("MatMul", softmax(net, scores), value)
        total = net.op("Add", total, net.op("MatMul", mixed, net.weight(DIM, WIDTH)))
    graph = net.finish(total)
    found = recognise(graph)
    assert [site.state for site in found.attention] == [State.LOWERABLE] * 4
    assert_lowered_is_the_same(graph, found)


def positions(net: Net) -> str:
    """Minus the distance of key and query, (S, S)."""
    length = net.op("Squeeze", net.shape("x", 1, 2), net.ints(0))
    steps = net.op("Range", net.constant(0, np.int64), length, net.constant(1, np.int64))
    steps = net.op("Cast", steps, to=TensorProto.FLOAT)
    return net.op("Neg", net.op("Abs", net.op("Sub", net.unsqueeze(steps, 0), net.unsqueeze(steps, 1))))


def rotated(net: Net, y: str) -> str:
    angles = np.arange(32)[:, None] * np.array([1.0, 0.1, 0.01])
    tables = (net.constant(np.concatenate([part(angles)] * 2, -1)) for part in (np.cos, np.sin))
    cos, sin = (net.op("Slice", table, net.ints(0), net.shape("x", 1, 2), net.ints(0)) for table in tables)
    one, two = net.op("Split", y, net.ints(3, 3), axis=2, outputs=2)
    turned = net.op("Concat", net.op("Neg", two), one, axis=2)
    return net.op("Add", net.op("Mul", y, cos), net.op("Mul", turned, sin))


def odd_loop(name: str) -> OnnxGraph:
    net, joined = Net(), []
    seen, distance = net.causal(), positions(net)
    for head, (query, key, value) in enumerate(separate(net)):
        if name == "rotated":
            query, key = rotated(net, query), rotated(net, key)
        scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), SCALE)
        if name == "a slope for each head":
            scores = net.op("Add", scores, net.times(distance, 0.5**head))
        if name == "a condition":
            scores = net.op("Where", seen, scores, net.scalar(-1e9))
        joined.append(net.op("MatMul", softmax(net, scores), value))
    return net.finish(net.op("Add", net.linear(net.op("Concat", *joined, axis=2)), "x"))


@pytest.mark.parametrize("name", ["rotated", "a slope for each head", "a condition"])
def test_odd_loops_are_one_attention(name: str) -> None:
    graph = odd_loop(name)
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.value.mapped) == (4, True)
    assert site.query.mapped == (name != "rotated")
    assert_lowered_is_the_same(graph, found)


def test_a_loop_over_groups_of_heads_is_one_attention() -> None:
    net, joined = Net(), []
    for _ in range(2):
        query, key, value = (net.heads(net.linear("x", WIDTH, 12), 2) for _ in range(3))
        scores = net.op("Add", net.content(query, key), net.hidden())
        joined.append(net.merged(net.op("MatMul", softmax(net, scores), value), 12))
    graph = net.finish(net.op("Add", net.linear(net.op("Concat", *joined, axis=2)), "x"), ("x", "mask"))
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.mask) == (4, "padding")
    assert_lowered_is_the_same(graph, found)


def test_one_softmax_over_folded_heads_is_no_loop() -> None:
    """Heads cut apart and put one after the other in the batch, as early TensorFlow code has it."""
    net = Net()
    sizes = net.ints(*[DIM] * HEADS)
    wide = (net.op("Split", net.linear("x"), sizes, axis=2, outputs=HEADS) for _ in range(3))
    query, key, value = (net.op("Concat", *parts, axis=0) for parts in wide)
    scores = net.times(net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), SCALE)
    parts = net.op("Split", net.op("MatMul", softmax(net, scores), value), axis=0, outputs=HEADS)
    graph = net.finish(net.op("Add", net.linear(net.op("Concat", *parts, axis=2)), "x"))
    found = recognise(graph)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert site.heads == 4
    assert_lowered_is_the_same(graph, found)
