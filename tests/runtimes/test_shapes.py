"""Shapes and dtypes worked out for values nobody declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.composites import composite
from rewriter.runtimes.shapes import Sizes, declare, dtype_of, sizes_of
from tests.runtimes.composite_graphs import tensor_input

F32 = np.float32


def node(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    made = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), name=f"{kind}_node")
    made.outputs[0].name = kind
    return made.outputs[0]


def x(*shape: int | str | None, dtype: Any = F32) -> ir.Value:
    return tensor_input("x", dtype, shape)


def weights(*shape: int, dtype: Any = F32) -> ir.Value:
    """An initialiser as lowering makes it: an array, with nothing declared."""
    return ir.Value(name="w", const_value=ir.tensor(np.ones(shape, dtype)))


def ints(*values: int) -> ir.Value:
    graph = ir.Graph([], [], nodes=[], name="holder")
    value = ir.Value(name="ints", const_value=ir.tensor(np.asarray(values, np.int64)))
    graph.register_initializer(value)
    return value


BSC = ("B", "S", 12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (x(*BSC), BSC),
        (weights(3, 4), (3, 4)),
        (node("Tanh", x(*BSC)), BSC),
        (node("MatMul", x(*BSC), weights(12, 5)), ("B", "S", 5)),
        (node("MatMul", x("B", 4, "S", 8), x("B", 1, 8, "T")), ("B", 4, "S", "T")),
        (node("Gemm", x("B", 12), weights(12, 5)), (None, None)),
        (node("Add", x(*BSC), weights(12)), BSC),
        (node("Add", x("B", 1, 12), x(1, "S", 1)), ("B", "S", 12)),
        (node("Add", x("B", 7), x(None, None)), (None, 7)),
        (node("Where", x("B", 1, "S", "T", dtype=np.bool_), x("B", 4, "S", "T"), weights()), ("B", 4, "S", "T")),
        (node("Transpose", x("B", "S", 4, 8), perm=[0, 2, 3, 1]), ("B", 4, 8, "S")),
        (node("Transpose", x("A", "B")), ("B", "A")),
        (node("Reshape", x(*BSC), ints(0, 0, 4, -1)), ("B", "S", 4, None)),
        (node("Reshape", x(*BSC), x(4, dtype=np.int64)), (None,) * 4),
        (node("Unsqueeze", x(*BSC), ints(1)), (None,) * 4),
        (node("Squeeze", x(*BSC), axes=[1]), (None,) * 2),
        (node("Gather", x(30, 12), x("B", "S", dtype=np.int64)), (None,) * 3),
        (node("Concat", x(*BSC), x(*BSC), axis=1), (None,) * 3),
        (composite("Linear", [x(*BSC), weights(12, 5)], "y").outputs[0], ("B", "S", 5)),
        (composite("SplitHeads", [x(*BSC)], "y", heads=3).outputs[0], ("B", 3, "S", 4)),
    ],
    ids=lambda given: given.name if isinstance(given, ir.Value) else str(given),
)
def test_sizes(value: ir.Value, expected: Sizes) -> None:
    assert sizes_of(value) == expected


@pytest.mark.parametrize("value", [x("B", "T", 12), x("B", 2, "T", 6)], ids=["rank 3", "rank 4"])
def test_sizes_of_attention(value: ir.Value) -> None:
    heads = {f"{role}_heads": count for role, count in (("query", 4), ("key", 2), ("value", 2))}
    picks = {
        f"{role}_head_of": of for role, of in (("query", (0, 1, 2, 3)), ("key", (0, 0, 1, 1)), ("value", (0, 0, 1, 1)))
    }
    made = composite("Attention", [x("B", "S", 32), x("B", "T", 16), value], "y", heads=4, scale=1.0, **heads, **picks)
    assert sizes_of(made.outputs[0]) == ("B", "S", 24)


def test_unknown_is_named_unless_the_rank_is_given() -> None:
    unknown = node("Novelty", x(*BSC))
    for value in (unknown, node("Add", x(*BSC), unknown), node("Attention", x(*BSC), x(*BSC), x(*BSC))):
        with pytest.raises(UnsupportedOperator, match="has no declared shape"):
            sizes_of(value)
        assert sizes_of(value, rank=3) == (None, None, None)


def test_dtype_is_that_of_the_nearest_declared_floats() -> None:
    ids = x("B", "S", dtype=np.int64)
    table = weights(30, 12, dtype=np.float16)
    assert dtype_of(node("Relu", node("Gather", table, ids))) == np.float16
    assert dtype_of(node("Relu", node("Cast", ids, to=int(ir.DataType.DOUBLE)))) == np.float64
    assert dtype_of(node("Relu", ids)) == np.float32


def test_declaring_adds_only_what_is_missing() -> None:
    value = node("Add", x(*BSC, dtype=np.float16), weights(12, dtype=np.float16))
    declare(value)
    assert value.dtype == ir.DataType.FLOAT16 and value.shape == ir.Shape(BSC)
    given = x(*BSC)
    declare(given)
    assert given.shape == ir.Shape(BSC) and given.dtype == ir.DataType.FLOAT
    unknown = node("Novelty", x(*BSC, dtype=np.int64))
    declare(unknown)
    assert unknown.shape is None and unknown.type is None
