"""Recurrent layers, one step after the other: RNN, GRU and LSTM with the standard's gate order and default functions.

Shapes: input (steps, batch, width), weights (directions, gates * hidden, ...), states (directions, batch, hidden);
with `layout` 1 the batch comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, operator

States = list[Tensor]
Step = Callable[[Tensor, States], States]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


@operator("RNN")
def rnn(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    """One gate, one state."""

    def steps(direction: int, weight: Tensor, bias: Tensor, _: Tensor) -> Step:
        (f,) = _activations(call, direction, ("Tanh",))
        return lambda fed, states: [f(fed + states[0] @ weight.T + bias)]

    return _run(call, x, w, r, b, rest, steps, states=1)


@operator("GRU")
def gru(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    """Update, reset and hidden gates."""

    def steps(direction: int, weight: Tensor, bias: Tensor, _: Tensor) -> Step:
        f, g = _activations(call, direction, ("Sigmoid", "Tanh"))
        first = bool(call.get("linear_before_reset", 0))
        (wz, wr, wh), (bz, br, bh) = weight.chunk(3), bias.chunk(3)

        def step(fed: Tensor, states: States) -> States:
            (h,), (xz, xr, xh) = states, fed.chunk(3, -1)
            z, reset = f(xz + h @ wz.T + bz), f(xr + h @ wr.T + br)
            inner = reset * (h @ wh.T + bh) if first else (reset * h) @ wh.T + bh
            return [(1 - z) * g(xh + inner) + z * h]

        return step

    return _run(call, x, w, r, b, rest, steps, states=1)


@operator("LSTM")
def lstm(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    """Input, output, forget and cell gates, maybe with peepholes; hidden and cell state."""
    if call.get("input_forget", 0):
        raise call.unsupported("coupled input and forget gates")

    def steps(direction: int, weight: Tensor, bias: Tensor, peep: Tensor) -> Step:
        f, g, h_ = _activations(call, direction, ("Sigmoid", "Tanh", "Tanh"))
        pi, po, pf = peep.chunk(3)

        def step(fed: Tensor, states: States) -> States:
            h, c = states
            i, o, forget, cell = (fed + h @ weight.T + bias).chunk(4, -1)
            c = f(forget + pf * c) * c + f(i + pi * c) * g(cell)
            return [f(o + po * c) * h_(c), c]

        return step

    return _run(call, x, w, r, b, rest, steps, states=2)


def _activations(call: Call, direction: int, default: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    names = call.get("activations") or [*default, *default]
    chosen = [str(name).lower() for name in names[direction * len(default) : (direction + 1) * len(default)]]
    unknown = [name for name in chosen if name not in _FUNCTIONS]
    if unknown or call.get("clip"):
        raise call.unsupported(f"activation {unknown[0]}" if unknown else "clipping")
    return [_FUNCTIONS[name] for name in chosen]


def _run(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    rest: Sequence[Tensor | None],
    steps: Callable[[int, Tensor, Tensor, Tensor], Step],
    states: int,
) -> tuple[Tensor, ...]:
    """All directions; each step gets the input through `w` and the first half of `b`."""
    lengths, initial, peep = rest[0] if rest else None, list(rest[1 : 1 + states]), rest[3] if len(rest) > 3 else None
    if lengths is not None and not bool((lengths == x.shape[1 if call.get("layout", 0) else 0]).all()):
        raise call.unsupported("sequences of different lengths")
    batch_first = bool(call.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    directions, hidden = r.shape[0], r.shape[2]
    ends, whole = [], []
    for d in range(directions):
        fed_bias, bias = (b[d] if b is not None else x.new_zeros(2 * r.shape[1])).chunk(2)
        step = steps(d, r[d], bias, x.new_zeros(3 * hidden) if peep is None else peep[d])
        current = [_initial(x, initial, i, d, hidden, batch_first) for i in range(states)]
        backwards = call.get("direction", "forward") == "reverse" or d == 1
        made: list[Tensor] = []
        for fed in (x.flip(0) if backwards else x) @ w[d].T + fed_bias:
            current = step(fed, current)
            made.append(current[0])
        whole.append(torch.stack(made[::-1] if backwards else made))
        ends.append(current)
    last = [torch.stack([state[i] for state in ends]) for i in range(states)]
    every = torch.stack(whole, 1)
    if batch_first:
        return every.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
    return every, *last


def _initial(
    x: Tensor, given: Sequence[Tensor | None], index: int, direction: int, hidden: int, batch_first: bool
) -> Tensor:
    state = given[index] if index < len(given) else None
    if state is None:
        return x.new_zeros(x.shape[1], hidden)
    return state[:, direction] if batch_first else state[direction]
