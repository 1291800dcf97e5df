"""Operators in the forms of opsets 7 to 12 that later opsets gave up, beside the runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.harness import compare, i64, numbers, whole


@pytest.mark.parametrize("opset", [7, 9])
def test_batch_normalisation(opset: int) -> None:
    x, gain, shift, mean, variance = numbers(2, 4, 3), *(numbers(4, seed=seed) for seed in (1, 2, 3, 4))
    compare("BatchNormalization", [x, gain, shift, mean, np.abs(variance)], opset=opset, runtime=True, epsilon=1e-3)


def test_top_k_by_attribute() -> None:
    compare("TopK", [numbers(3, 7)], opset=9, runtime=True, outputs=("y0", "y1"), k=3, axis=1)
    compare("TopK", [numbers(3, 7), i64(2)], opset=10, runtime=True, outputs=("y0", "y1"), axis=0)


@pytest.mark.parametrize("opset", [7, 10])
def test_dropout_with_its_ratio_as_attribute(opset: int) -> None:
    compare("Dropout", [numbers(3, 4)], opset=opset, runtime=True, ratio=0.5)


def test_products() -> None:
    compare(
        "Gemm", [numbers(3, 4), numbers(5, 4, seed=1), numbers(5, seed=2)], opset=7, runtime=True, transB=1, beta=0.5
    )
    compare("Gemm", [numbers(4, 3), numbers(4, 5, seed=1), numbers(1, 5, seed=2)], opset=9, runtime=True, transA=1)
    compare("MatMul", [numbers(2, 3, 4), numbers(4, 5, seed=1)], opset=8, runtime=True)


def test_pooling() -> None:
    compare("MaxPool", [numbers(1, 2, 6, 6)], opset=8, runtime=True, kernel_shape=[2, 2], strides=[2, 2])
    compare("AveragePool", [numbers(1, 2, 6, 6)], opset=7, runtime=True, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def test_indexing() -> None:
    x = numbers(3, 4)
    compare("Scatter", [x, whole(2, 4, low=0, high=3), numbers(2, 4, seed=1)], opset=9, runtime=True)
    compare("OneHot", [whole(2, 3, low=0, high=5), i64(5), np.array([0, 1], np.float32)], opset=9, runtime=True)
    compare("Gather", [x, whole(2, 2, low=0, high=3)], opset=8, runtime=True)
    compare("Slice", [x, i64(0), i64(3), i64(1), i64(2)], opset=10, runtime=True)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp"])
def test_reductions_by_attribute(op: str) -> None:
    compare(op, [numbers(2, 3, 4)], opset=10, runtime=True, axes=[-1] if op != "ReduceSum" else [2], keepdims=1)
    compare(op, [numbers(2, 3, 4)], opset=10, runtime=True, axes=[0, 2], keepdims=0)


def test_arithmetic() -> None:
    compare("Max", [numbers(3, 4), numbers(1, 4, seed=1)], opset=8, runtime=True)
    compare("Pow", [np.abs(numbers(3, 4)), np.array(3.0, np.float32)], opset=7, runtime=True)
    compare("Cast", [numbers(3, 4) * 5], opset=9, runtime=True, to=6)
    compare("Expand", [numbers(3, 1), i64(2, 3, 4)], opset=8, runtime=True)
    compare("Where", [numbers(3, 4) > 0, numbers(3, 4, seed=1), numbers(4, seed=2)], opset=9, runtime=True)
    compare("Flatten", [numbers(2, 3, 4)], opset=9, runtime=True, axis=2)
