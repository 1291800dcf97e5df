"""Element-wise operators and activations against the ONNX reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.harness import compare, i64, numbers, whole

REAL = [
    "Abs",
    "Asinh",
    "Atan",
    "Ceil",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsNaN",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
    "Celu",
    "ThresholdedRelu",
    "Shrink",
    "Gelu",
]


@pytest.mark.parametrize("op", REAL)
def test_functions_of_one_real(op: str) -> None:
    compare(op, [3 * numbers(3, 5)])


@pytest.mark.parametrize("op", ["Acos", "Asin", "Atanh"])
def test_functions_of_the_unit_interval(op: str) -> None:
    compare(op, [np.linspace(-0.9, 0.9, 7, dtype=np.float32)])


@pytest.mark.parametrize("op", ["Acosh", "Log", "Reciprocal", "Sqrt"])
def test_functions_of_positive_numbers(op: str) -> None:
    compare(op, [np.linspace(1.0, 5.0, 7, dtype=np.float32)])


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "PRelu"])
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((2, 3, 4), (3, 1))])
def test_arithmetic_broadcasts(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    compare(op, [np.abs(numbers(*shapes[0])) + 0.5, numbers(*shapes[1], seed=1)])


def test_integer_division_truncates_towards_zero() -> None:
    found = compare("Div", [i64(-7, 7, -7, 7), i64(2, 2, -2, -2)], runtime=True)
    assert found[0].tolist() == [-3, 3, 3, -3]


@pytest.mark.parametrize("op", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
@pytest.mark.parametrize("make", [numbers, whole])
def test_comparison(op: str, make: object) -> None:
    assert callable(make)
    compare(op, [make(3, 4), make(3, 4, seed=1)])


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op: str) -> None:
    compare(op, [numbers(3, 4) > 0, numbers(4, seed=1) > 0])


def test_not() -> None:
    compare("Not", [numbers(3, 4) > 0])


@pytest.mark.parametrize("op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
def test_bitwise(op: str) -> None:
    compare(op, [whole(3, 4, low=0, high=64, dtype=np.int32), whole(3, 4, low=0, high=64, seed=1, dtype=np.int32)])


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bit_shift(direction: str) -> None:
    compare("BitShift", [whole(4, low=1, high=9, dtype=np.uint8), np.full(4, 2, np.uint8)], direction=direction)


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_operands(op: str, count: int) -> None:
    compare(op, [numbers(2, 3, seed=i) for i in range(count)])


@pytest.mark.parametrize("fmod", [0, 1])
def test_modulo_of_integers(fmod: int) -> None:
    compare("Mod", [i64(-7, 7, -7, 7), i64(3, 3, -3, -3)], fmod=fmod)


def test_modulo_of_reals() -> None:
    compare("Mod", [numbers(5), np.abs(numbers(5, seed=1)) + 0.5], fmod=1)


def test_where() -> None:
    compare("Where", [numbers(3, 1) > 0, numbers(3, 4), numbers(4, seed=1)])


@pytest.mark.parametrize("attributes", [{}, {"detect_positive": 0}, {"detect_negative": 0}])
def test_is_inf(attributes: dict[str, int]) -> None:
    compare("IsInf", [np.array([1, np.inf, -np.inf, np.nan], np.float32)], **attributes)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (None, 0.5), (-0.5, None), (0.5, -0.5)])
def test_clip_with_inputs(low: float | None, high: float | None) -> None:
    bounds = [None if bound is None else np.array(bound, np.float32) for bound in (low, high)]
    compare("Clip", [numbers(3, 4), *bounds], opset=13, runtime=True)


def test_clip_with_attributes() -> None:
    compare("Clip", [numbers(3, 4)], opset=6, runtime=True, min=-0.5, max=0.25)


@pytest.mark.parametrize("target", [1, 6, 7, 9, 10, 11, 16])
def test_cast_of_reals(target: int) -> None:
    compare("Cast", [3 * numbers(3, 4)], opset=20, to=target)


def test_cast_like() -> None:
    compare("CastLike", [3 * numbers(3, 4), i64(1)])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    compare("Gelu", [numbers(3, 4)], approximate=approximate)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_softmax_along_an_axis(op: str, axis: int) -> None:
    compare(op, [numbers(2, 3, 4)], opset=13, axis=axis)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_flattened_before_opset_13(op: str, axis: int) -> None:
    compare(op, [numbers(2, 3, 4)], opset=11, runtime=True, axis=axis)


def test_softmax_meaning_changes_with_opset() -> None:
    x = numbers(2, 3, 4)
    old, new = (compare("Softmax", [x], opset=opset, runtime=True, axis=1)[0] for opset in (11, 13))
    assert np.abs(old - new).max() > 0.01


def test_swish() -> None:
    compare("Swish", [numbers(3, 4)], opset=24, alpha=1.5)
    if onnx.defs.onnx_opset_version() >= 28:
        compare("SwiGLU", [numbers(3, 4), numbers(3, 4, seed=1)], opset=28, alpha=1.5)


def test_half_precision() -> None:
    compare("Add", [numbers(3, dtype=np.float16), numbers(3, seed=1, dtype=np.float16)])
