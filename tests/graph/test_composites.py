"""Composite operators: their meaning, written here a second time in numpy, and their well-formedness."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rewriter.graph.composites import COMPOSITE_DOMAIN, composite, composite_problems, is_composite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.operators.number_formats import rounded_product
from tests.graph.harness import numbers


def run(operator: str, *arrays: np.ndarray | None, **attributes: Any) -> np.ndarray:
    values = [None if array is None else _value(f"x{i}", array) for i, array in enumerate(arrays)]
    node = composite(operator, values, "y", **attributes)
    inputs = [value for value in values if value is not None]
    graph = ir.Graph(inputs, list(node.outputs), nodes=[node], opset_imports={"": 20, COMPOSITE_DOMAIN: 1})
    feeds = {f"x{i}": torch.from_numpy(array) for i, array in enumerate(arrays) if array is not None}
    return Interpreter(OnnxGraph(ir.Model(graph, ir_version=10)), torch.float64).run(feeds)["y"].numpy()


def _value(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))


def softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def heads_of(groups: int) -> dict[str, Any]:
    return {
        "heads": 4,
        "query_heads": 4,
        "key_heads": groups,
        "value_heads": groups,
        "query_head_of": [0, 1, 2, 3],
        "key_head_of": [1, 0, 1, 0][:4] if groups == 2 else [0, 1, 2, 3],
        "value_head_of": [1, 0, 1, 0][:4] if groups == 2 else [0, 1, 2, 3],
    }


@pytest.mark.parametrize("activation", ["", "relu", "tanh", "silu", "quick_gelu"])
def test_linear(activation: str) -> None:
    x, w, b = numbers(2, 3, 4), numbers(4, 5, seed=1), numbers(5, seed=2)
    y = x.astype(np.float64) @ w + b
    known = {
        "": y,
        "relu": np.maximum(y, 0),
        "tanh": np.tanh(y),
        "silu": y / (1 + np.exp(-y)),
        "quick_gelu": y / (1 + np.exp(-1.702 * y)),
    }
    np.testing.assert_allclose(run("Linear", x, w, b, activation=activation), known[activation], rtol=1e-10)


def test_split_heads() -> None:
    x = numbers(2, 3, 8)
    np.testing.assert_allclose(run("SplitHeads", x, heads=2), x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_reads_the_heads_it_is_told_to(rank: int) -> None:
    q, k, v = numbers(2, 4, 3, 8), numbers(2, 2, 5, 8, seed=1), numbers(2, 2, 5, 6, seed=2)
    bias = numbers(2, 1, 3, 5, seed=3)
    picks = [1, 0, 1, 0]
    scores = 1.5 * np.tanh(0.3 * np.einsum("bhsd,bhtd->bhst", q, k[:, picks]) / 1.5) + bias
    right = np.einsum("bhst,bhtd->bshd", softmax(scores.astype(np.float64)), v[:, picks]).reshape(2, 3, -1)
    operands = [q, k, v]
    if rank == 3:
        operands = [x.transpose(0, 2, 1, 3).reshape(2, x.shape[2], -1) for x in operands]
    found = run("Attention", *operands, bias, scale=0.3, softcap=1.5, bias_kind="add", **heads_of(2))
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["nan", "zero"])
def test_attention_with_rows_that_see_nothing(rule: str) -> None:
    q, k, v = (numbers(1, 4, 3, 4, seed=i) for i in range(3))
    allowed = np.ones((1, 1, 3, 3), bool)
    allowed[..., 1, :] = False
    found = run("Attention", q, k, v, allowed, scale=0.5, bias_kind="bool", empty_rows=rule, **heads_of(4))
    assert np.all(np.isfinite(found[:, [0, 2]]))
    assert np.all(np.isnan(found[:, 1])) if rule == "nan" else np.all(found[:, 1] == 0)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_rotary_turns_pairs(interleaved: int, sign: int) -> None:
    x, angle = numbers(2, 3, 5, 6), numbers(5, 2, seed=1)
    spread = np.repeat(angle, 2, 1) if interleaved else np.tile(angle, 2)
    first = [0, 2] if interleaved else [0, 1]
    second = [1, 3] if interleaved else [2, 3]
    a, b = x[..., first], x[..., second]
    right = x.copy()
    right[..., first] = a * np.cos(angle) - sign * b * np.sin(angle)
    right[..., second] = b * np.cos(angle) + sign * a * np.sin(angle)
    found = run("Rotary", x, np.cos(spread), np.sin(spread), size=4, interleaved=interleaved, sign=sign)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_head_norm(kind: str) -> None:
    x, gain, bias = numbers(2, 3, 5, 8), numbers(8, seed=1), numbers(8, seed=2)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if kind == "layer" else wide
    right = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * gain + bias
    np.testing.assert_allclose(run("HeadNorm", x, gain, bias, kind=kind, epsilon=1e-3), right, rtol=1e-6)


def test_malformed_composites_are_refused_when_made() -> None:
    x = ir.Value(name="x")
    with pytest.raises(ValueError, match="lacks heads"):
        composite("SplitHeads", [x], "y")
    with pytest.raises(ValueError, match="takes 2 to 3 inputs, not 1"):
        composite("Linear", [x], "y")
    with pytest.raises(ValueError, match="unknown activation 'sine'"):
        composite("Linear", [x, x], "y", activation="sine")
    with pytest.raises(ValueError, match="unknown attribute colour"):
        composite("SplitHeads", [x], "y", heads=2, colour=1)
    with pytest.raises(ValueError, match="key_head_of must name one of 2 heads for each of 4"):
        composite("Attention", [x, x, x], "y", scale=1.0, **{**heads_of(2), "key_head_of": [0, 1, 2, 0]})
    with pytest.raises(ValueError, match="bias_kind 'add' does not fit no bias"):
        composite("Attention", [x, x, x], "y", scale=1.0, bias_kind="add", **heads_of(4))
    with pytest.raises(ValueError, match="does not exist"):
        composite("Convolve", [x], "y")


def test_problems_of_foreign_nodes() -> None:
    node = ir.Node(COMPOSITE_DOMAIN, "SplitHeads", [ir.Value(name="x")], num_outputs=2)
    assert any("one output, not 2" in problem for problem in composite_problems(node))
    assert is_composite(node) and is_composite(node, "SplitHeads") and not is_composite(node, "Linear")


def test_linear_in_8_bit_integers() -> None:
    x, w, b = numbers(2, 3, 40), numbers(40, 5, seed=1), numbers(5, seed=2)
    x[0, 1], w[:, 2] = 0.0, 0.0
    x[1, 2] = np.abs(x[1, 2])
    column = np.maximum(np.abs(w).max(0, keepdims=True), 1e-30) / 127
    low = np.minimum(x.min(-1, keepdims=True), 0)
    token = np.maximum(np.maximum(x.max(-1, keepdims=True), 0) - low, 1e-30) / 254
    zero = np.rint(-low / token)
    levels, weights = np.rint(x / token + zero) - zero, np.rint(w / column)
    assert np.ptp(levels, -1).max() in (254, 255) and np.abs(weights).max() == 127 and not zero[1, 2]
    y = levels @ weights * (token * column).astype(np.float64) + b
    np.testing.assert_allclose(run("Linear", x, w, b, precision="int8"), y, rtol=1e-6)


def test_linear_in_bfloat16() -> None:
    x, w = numbers(2, 3, 40), numbers(40, 5, seed=1)
    mantissa, exponent = np.frexp(np.concatenate([x.reshape(-1, 40), w.T]).astype(np.float64))
    rounded = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    y = (rounded[:6] @ rounded[6:].T).reshape(2, 3, 5)
    np.testing.assert_allclose(run("Linear", x, w, precision="bf16"), y, rtol=1e-12)


def test_sums_of_many_levels_keep_their_digits_in_single_precision() -> None:
    x, w = numbers(4, 5000), numbers(5000, 3, seed=1)
    single = rounded_product(torch.from_numpy(x), torch.from_numpy(w), "int8")
    double = rounded_product(torch.from_numpy(x).double(), torch.from_numpy(w).double(), "int8")
    assert float((single - double).norm() / double.norm()) < 1e-4  # a tie may fall to the other side


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        run("Linear", numbers(2, 4), numbers(4, 5), precision="int4")


def test_attention_in_bfloat16() -> None:
    q, k, v = (numbers(1, 2, 5, 8, seed=seed) for seed in range(3))
    operands = {f"{role}_heads": 2 for role in ("query", "key", "value")}
    picks = {f"{role}_head_of": [0, 1] for role in ("query", "key", "value")}
    found = run("Attention", q, k, v, scale=0.5, heads=2, precision="bf16", **operands, **picks)
    q, k, v = (torch.from_numpy(x).bfloat16().double().numpy() for x in (q, k * np.float32(0.5), v))
    scores = q @ k.transpose(0, 1, 3, 2)
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    weights = torch.from_numpy(raised).bfloat16().double().numpy() / raised.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, (weights @ v).transpose(0, 2, 1, 3).reshape(1, 5, -1), rtol=1e-9)
    with pytest.raises(ValueError, match="precision must be fp32 or bf16"):
        run("Attention", q, k, v, scale=0.5, heads=2, precision="int8", **operands, **picks)
