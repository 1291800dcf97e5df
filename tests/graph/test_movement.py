"""Shapes, views, indexing and reductions against the ONNX reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.core.errors import ModelError, UnsupportedOperator
from tests.graph.harness import compare, i64, numbers, one_node, ours, whole


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis: int) -> None:
    compare("Concat", [numbers(2, 3), numbers(2, 3, seed=1)], axis=axis)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 4), (3, 1), (5, 1, 3, 4)])
def test_expand(shape: tuple[int, ...]) -> None:
    compare("Expand", [numbers(3, 4) if len(shape) < 3 else numbers(3, 1), i64(*shape)])


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flatten(axis: int) -> None:
    compare("Flatten", [numbers(2, 3, 4)], axis=axis)


@pytest.mark.parametrize("shape", [(4, 6), (-1, 4), (0, -1), (2, 0, 4), (24,)])
def test_reshape(shape: tuple[int, ...]) -> None:
    compare("Reshape", [numbers(2, 3, 4), i64(*shape)])


def test_reshape_of_nothing() -> None:
    compare("Reshape", [numbers(0, 3), i64(3, 0)], allowzero=1)


@pytest.mark.parametrize("perm", [None, (0, 2, 1), (2, 0, 1)])
def test_transpose(perm: tuple[int, ...] | None) -> None:
    compare("Transpose", [numbers(2, 3, 4)], **({"perm": perm} if perm else {}))


@pytest.mark.parametrize("axes", [None, (1,), (-1, 1)])
def test_squeeze_by_input(axes: tuple[int, ...] | None) -> None:
    compare("Squeeze", [numbers(2, 1, 3, 1), *([i64(*axes)] if axes else [])], opset=13)


def test_squeeze_and_unsqueeze_by_attribute() -> None:
    compare("Squeeze", [numbers(2, 1, 3, 1)], opset=11, axes=[1, -1])
    compare("Unsqueeze", [numbers(2, 3)], opset=11, axes=[0, -1])


def test_squeeze_of_a_long_axis_is_an_error() -> None:
    proto = one_node("Squeeze", [numbers(2, 3), i64(1)], 13)
    with pytest.raises(ModelError, match=r"Squeeze.*axis 1 has size 3"):
        ours(proto, {"x0": numbers(2, 3), "x1": i64(1)})


@pytest.mark.parametrize("axes", [(0,), (-1, 0), (3, 1)])
def test_unsqueeze(axes: tuple[int, ...]) -> None:
    compare("Unsqueeze", [numbers(2, 3), i64(*axes)], opset=13)


def test_split_variants() -> None:
    compare("Split", [numbers(6, 2), i64(1, 2, 3)], outputs=("y0", "y1", "y2"), opset=13)
    compare("Split", [numbers(6, 2)], outputs=("y0", "y1"), opset=13)
    compare("Split", [numbers(7, 2)], outputs=("y0", "y1", "y2"), opset=18, num_outputs=3)
    compare("Split", [numbers(2, 6)], outputs=("y0", "y1"), opset=11, axis=1, split=[2, 4])


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ((0, 1), (2, 3), (0, 1), (1, 1)),
        ((-3,), (2**62,), (1,), (1,)),
        ((5,), (0,), (1,), (-2,)),
        ((-1,), (-(2**62),), (1,), (-1,)),
        ((2**62,), (1,), (-1,), (-1,)),
        ((3,), (1,), (1,), (1,)),
        ((0,), (2**63 - 1,), (0,), (2,)),
        ((-1,), (-(2**63),), (0,), (-1,)),
    ],
)
def test_slice_by_inputs(starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    compare("Slice", [numbers(4, 6), i64(*starts), i64(*ends), i64(*axes), i64(*steps)], opset=13)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 6),
    st.integers(-9, 9),
    st.one_of(st.integers(-9, 9), st.just(2**63 - 1), st.just(-(2**63))),
    st.integers(-3, 3).filter(bool),
)
def test_slice_of_one_axis_is_numpys(size: int, start: int, end: int, step: int) -> None:
    x = numbers(2, size)
    inputs = [x, i64(start), i64(end), i64(1), i64(step)]
    found = ours(one_node("Slice", inputs, 13), {f"x{i}": array for i, array in enumerate(inputs)})
    # An end below -size means "before the first" going backwards, where numpy wants None.
    stop = None if step < 0 and end < -size else end
    np.testing.assert_array_equal(found[0], x[:, slice(start, stop, step)])


def test_slice_by_attributes() -> None:
    compare("Slice", [numbers(4, 6)], opset=9, runtime=True, starts=[1, -3], ends=[3, 1000])


def test_tile_trilu_and_range() -> None:
    compare("Tile", [numbers(2, 3), i64(2, 3)])
    for upper in (0, 1):
        compare("Trilu", [numbers(4, 5), np.array(1)], upper=upper)
        compare("Trilu", [numbers(2, 4, 4)], upper=upper)
    compare("Range", [np.array(1), np.array(10), np.array(3)])
    compare("Range", [np.float32(3), np.float32(0), np.float32(-0.7)])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    compare("DepthToSpace", [numbers(1, 8, 2, 3)], blocksize=2, mode=mode)
    compare("SpaceToDepth", [numbers(1, 2, 4, 6)], blocksize=2)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(mode: str) -> None:
    compare("Pad", [numbers(3, 4), i64(1, 2, 2, 1)], opset=19, mode=mode)


def test_pad_variants() -> None:
    compare("Pad", [numbers(3, 4), i64(1, 2), np.float32(7), i64(-1)], opset=18)
    compare("Pad", [numbers(3, 4), i64(0, -1, 0, -1)], opset=13, runtime=True)
    compare("Pad", [numbers(3, 4)], opset=10, runtime=True, pads=[0, 1, 1, 0], value=2.0)


@pytest.mark.parametrize(("batch_axis", "time_axis"), [(1, 0), (0, 1)])
def test_reverse_sequence(batch_axis: int, time_axis: int) -> None:
    x = numbers(4, 4, 2)
    compare("ReverseSequence", [x, i64(1, 2, 4, 3)], batch_axis=batch_axis, time_axis=time_axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("index", [i64(0, -1), np.array(1), i64(0, 1, 2, 0).reshape(2, 2)])
def test_gather(axis: int, index: np.ndarray) -> None:
    compare("Gather", [numbers(3, 4, 5), index], axis=axis)


def test_gather_and_scatter_elements() -> None:
    index = whole(2, 4, low=-3, high=3)
    compare("GatherElements", [numbers(3, 4), index], axis=0)
    places = i64(1, 0, 2, 2, 1, 0).reshape(2, 3)
    for reduction in ("none", "add", "mul", "max", "min"):
        compare("ScatterElements", [numbers(3, 3), places, numbers(2, 3, seed=1)], opset=18, reduction=reduction)


@pytest.mark.parametrize("batch", [0, 1])
def test_gather_nd(batch: int) -> None:
    index = i64(0, 1, -1, 0).reshape(2, 2) if batch == 0 else i64(1, 0).reshape(2, 1)
    compare("GatherND", [numbers(2, 3, 4), index], batch_dims=batch)
    compare("GatherND", [numbers(2, 3, 4), whole(2, 3, 1, low=0, high=3)], batch_dims=1)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter_nd(reduction: str) -> None:
    index = i64(0, 2).reshape(2, 1)
    compare("ScatterND", [numbers(4, 3), index, numbers(2, 3, seed=1)], opset=18, reduction=reduction)
    pairs = i64(0, 2, 3, -1).reshape(2, 2)
    compare("ScatterND", [numbers(4, 3), pairs, numbers(2, seed=1)], opset=18, reduction=reduction)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(mode: str) -> None:
    starts = i64(1, 2) if mode == "linear" else i64(3, 2)
    compare("TensorScatter", [numbers(2, 1, 4, 3), numbers(2, 1, 2, 3, seed=1), starts], opset=24, mode=mode)


def test_selection() -> None:
    compare("NonZero", [whole(3, 4, low=0, high=2)])
    compare("Compress", [numbers(3, 4), np.array([True, False, True])], axis=0)
    compare("Compress", [numbers(3, 4), np.array([False, True, True])])
    compare("OneHot", [i64(0, -1, 2), np.array(3), numbers(2)], axis=0)
    compare("OneHot", [i64(0, 1, 2, 1).reshape(2, 2), np.array(3), numbers(2)])
    compare("EyeLike", [numbers(3, 4)], k=1)
    compare("TopK", [numbers(3, 6), i64(2)], outputs=("y0", "y1"))
    compare("TopK", [numbers(3, 6), i64(2)], outputs=("y0", "y1"), axis=0, largest=0)
    compare("Unique", [whole(8, low=0, high=4)], outputs=("y0", "y1", "y2", "y3"))
    compare("Unique", [whole(8, low=0, high=4)], outputs=("y0", "y1", "y2", "y3"), sorted=0)


REDUCTIONS = [
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSum",
    "ReduceLogSumExp",
]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1])
def test_reduction_by_input(op: str, keep: int) -> None:
    x = np.abs(numbers(2, 3, 4)) + 0.1
    compare(op, [x, i64(0, -1)], opset=18, keepdims=keep)
    compare(op, [x], opset=18, keepdims=keep)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduction_by_attribute(op: str) -> None:
    compare(op, [np.abs(numbers(2, 3, 4)) + 0.1], opset=11, axes=[1], keepdims=0)


def test_reduction_with_no_axes_as_identity() -> None:
    compare("ReduceSum", [numbers(2, 3), i64()], opset=18, noop_with_empty_axes=1)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"])
def test_reduction_of_integers(op: str) -> None:
    compare(op, [whole(2, 3, 4, dtype=np.int32), i64(1)], opset=18)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg_reduction(op: str, last: int) -> None:
    compare(op, [whole(3, 6, low=0, high=3, dtype=np.int32)], axis=1, select_last_index=last)
    compare(op, [numbers(3, 6)], axis=0, keepdims=0)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumulative_sum(exclusive: int, reverse: int) -> None:
    compare("CumSum", [numbers(3, 4), np.array(1)], exclusive=exclusive, reverse=reverse)
    if onnx.defs.onnx_opset_version() >= 26:
        compare("CumProd", [numbers(3, 4), np.array(1)], opset=26, exclusive=exclusive, reverse=reverse)


def test_shape_and_size() -> None:
    compare("Shape", [numbers(2, 3, 4)])
    compare("Shape", [numbers(2, 3, 4)], opset=15, start=-2, end=3)
    compare("Size", [numbers(2, 3, 4)])
    compare("ConstantOfShape", [i64(2, 3)])


def test_absurd_sizes_are_refused_before_allocation() -> None:
    shape = i64(2**40, 2**10)
    with pytest.raises(ModelError, match="asks for a tensor of shape"):
        ours(one_node("ConstantOfShape", [shape], 20), {"x0": shape})


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_operators_are_refused(op: str) -> None:
    with pytest.raises(UnsupportedOperator, match="random"):
        ours(one_node(op, [numbers(3)], 20), {"x0": numbers(3)})


def test_dropout() -> None:
    compare("Dropout", [numbers(3, 4)], outputs=("y0", "y1"), opset=13)
    compare("Dropout", [numbers(3, 4)], opset=7, runtime=True)
    live = [numbers(3, 4), np.float32(0.5), np.array(True)]
    with pytest.raises(UnsupportedOperator, match="training"):
        ours(one_node("Dropout", live, 13), {f"x{i}": array for i, array in enumerate(live)})
