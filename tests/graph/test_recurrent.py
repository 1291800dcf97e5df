"""Recurrent layers and sampling at places, against ONNX Runtime."""

from __future__ import annotations

import pytest

from rewriter.core.errors import UnsupportedOperator
from tests.graph.harness import compare, numbers, one_node, ours

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("given", [False, True])
def test_recurrent(op: str, direction: str, given: bool) -> None:
    steps, batch, width, hidden, gates = 5, 2, 3, 4, GATES[op]
    d = 2 if direction == "bidirectional" else 1
    inputs = [
        numbers(steps, batch, width),
        numbers(d, gates * hidden, width, seed=1),
        numbers(d, gates * hidden, hidden, seed=2),
    ]
    if given:
        inputs += [numbers(d, 2 * gates * hidden, seed=3), None, numbers(d, batch, hidden, seed=4)]
    if given and op == "LSTM":
        inputs += [numbers(d, batch, hidden, seed=5), numbers(d, 3 * hidden, seed=6)]
    outputs = ("y0", "y1", "y2") if op == "LSTM" else ("y0", "y1")
    compare(op, inputs, opset=17, runtime=True, outputs=outputs, hidden_size=hidden, direction=direction)


def test_a_gru_may_reset_after_the_product() -> None:
    inputs = [numbers(5, 2, 3), numbers(1, 12, 3, seed=1), numbers(1, 12, 4, seed=2), numbers(1, 24, seed=3)]
    compare("GRU", inputs, opset=17, runtime=True, outputs=("y0", "y1"), hidden_size=4, linear_before_reset=1)


def test_clipped_gates_are_refused() -> None:
    inputs = [numbers(5, 2, 3), numbers(1, 4, 3, seed=1), numbers(1, 4, 4, seed=2)]
    with pytest.raises(UnsupportedOperator, match="clipping"):
        ours(one_node("RNN", inputs, 17, hidden_size=4, clip=1.0), {f"x{i}": array for i, array in enumerate(inputs)})


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [0, 1])
def test_grid_sample(mode: str, padding: str, corners: int) -> None:
    grid = 0.9 * numbers(2, 3, 5, 2, seed=1)
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
    compare("GridSample", [numbers(2, 3, 4, 6), grid], opset=16, runtime=True, **attributes)
