"""Masks in every place and order. All are lowered, rows without any key included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import OnnxGraph
from tests.attention.written import Net, assert_lowered_is_the_same, attention, softmax

LOWEST = float(np.finfo(np.float32).min)


def where(net: Net, scores: str, allowed: str, fill: float) -> str:
    return net.op("Where", allowed, scores, net.scalar(fill))


def added(net: Net, scores: str, fill: float) -> str:
    return net.op("Add", scores, net.hidden(fill))


def multiplied(net: Net, scores: str) -> str:
    """GPT-2 in TensorFlow: scores * b - 1e4 * (1 - b)."""
    seen = net.op("Cast", net.causal(), to=1)
    return net.op("Sub", net.op("Mul", scores, seen), net.times(net.op("Sub", net.scalar(1.0), seen), 1e4))


def capped(net: Net, scores: str, cap: float = 5.0) -> str:
    return net.times(net.op("Tanh", net.op("Div", scores, net.scalar(cap))), cap)


def clipped(net: Net, scores: str, limit: float = 5e4) -> str:
    return net.op("Clip", scores, net.scalar(-limit), net.scalar(limit))


Form = Callable[[Net, str], str]
FORMS: dict[str, Form] = {
    "where, then padding of -1e4": lambda n, s: added(n, where(n, s, n.causal(), -1e4), -1e4),
    "where of the lowest float, then padding": lambda n, s: added(n, where(n, s, n.causal(), LOWEST), LOWEST),
    "where of -inf, then padding": lambda n, s: added(n, where(n, s, n.causal(), -np.inf), -1e4),
    "padding, then where": lambda n, s: where(n, added(n, s, -1e9), n.causal(), -1e9),
    "padding of -1e4, then where": lambda n, s: where(n, added(n, s, -1e4), n.causal(), -1e4),
    "multiplied, then padding": lambda n, s: added(n, multiplied(n, s), -1e4),
    "multiplied by the padding": lambda n, s: added(n, n.op("Mul", s, n.valid()), -1e4),
    "both conditions at once": lambda n, s: where(n, s, n.op("And", n.causal(), n.allowed()), -1e4),
    "where after where": lambda n, s: where(n, where(n, s, n.causal(), -1e4), n.allowed(), -1e9),
    "where after where, -inf": lambda n, s: where(n, where(n, s, n.causal(), -np.inf), n.allowed(), -np.inf),
    "cap, then padding": lambda n, s: added(n, capped(n, s), -1e4),
    "cap, then where, then padding": lambda n, s: added(n, where(n, capped(n, s), n.causal(), -1e4), -1e4),
    "kept from overflowing": lambda n, s: added(n, clipped(n, s), -1e9),
    "scaled after the mask": lambda n, s: n.times(added(n, s, -1e4), 0.5),
    "the other way round": lambda n, s: n.op("Add", n.hidden(-1e9), s),
}
ALONE: dict[str, Form] = {
    "multiplied": multiplied,
    "cap, then where": lambda n, s: where(n, capped(n, s), n.causal(), -1e4),
}
REPLACED = {
    "where, then padding of -1e4",
    "padding, then where",
    "padding of -1e4, then where",
    "multiplied, then padding",
    "multiplied by the padding",
    "where after where",
    "cap, then where, then padding",
}


def graph(name: str) -> OnnxGraph:
    form = FORMS.get(name) or ALONE[name]
    return attention(lambda net, query, key: form(net, net.content(query, key)), masked=name in FORMS)


@pytest.mark.parametrize("name", [*FORMS, *ALONE])
def test_masks_before_the_softmax(name: str) -> None:
    model = graph(name)
    found = recognise(model)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert site.causal == ("where" in name or "mult" in name or "both" in name) & (name != "multiplied by the padding")
    assert site.softcap == (5.0 if "cap" in name else 0.0)
    assert bool(site.bias.kept[1]) == (name in REPLACED)
    assert_lowered_is_the_same(model, found)


def masked(net: Net, scores: str) -> str:
    return net.op("Mul", softmax(net, scores), net.valid())


def shared(net: Net, numbers: str, floor: float = 0.0) -> str:
    total = net.total(numbers)
    return net.op("Div", numbers, net.op("Add", total, net.scalar(floor)) if floor else total)


LATE: dict[str, Form] = {
    "shared anew": lambda n, s: shared(n, masked(n, s)),
    "shared anew with a floor": lambda n, s: shared(n, masked(n, s), 1e-13),
    "scores multiplied as well": lambda n, s: shared(n, masked(n, n.op("Mul", s, n.valid())), 1e-13),
    "exponentials": lambda n, s: shared(n, n.op("Mul", n.op("Exp", s), n.valid())),
    "after a mask of the scores": lambda n, s: where(n, softmax(n, where(n, s, n.allowed(), -1e4)), n.allowed(), 0.0),
}


@pytest.mark.parametrize("name", LATE)
def test_masks_after_the_exponential(name: str) -> None:
    model = attention(probabilities=LATE[name])
    found = recognise(model)
    (site,) = found.attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.mask, site.bias.logarithm) == ("padding", True)
    assert_lowered_is_the_same(model, found)


def test_masked_probabilities_that_are_not_shared_anew_are_mapped() -> None:
    (site,) = recognise(attention(probabilities=masked)).attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["probabilities-changed"]


@pytest.mark.parametrize("name", ["a cap after the mask", "a fill too small to hide"])
def test_what_the_composite_cannot_say_is_mapped(name: str) -> None:
    forms: dict[str, Form] = {
        "a cap after the mask": lambda n, s: capped(n, added(n, s, -1e4)),
        "a fill too small to hide": lambda n, s: where(n, s, n.allowed(), -20.0),
    }
    (site,) = recognise(attention(lambda n, q, k: forms[name](n, n.content(q, k)))).attention
    assert site.state is State.MAPPED
    assert [problem.code for problem in site.problems] == ["unknown-score-function"]
    assert (site.heads, site.qk_dim, site.v_dim) == (4, 6, 6)
