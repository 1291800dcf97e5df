"""Inputs drawn without data."""

import numpy as np
import pytest

from rewriter.calibration.data import draw_inputs
from rewriter.core.errors import OptionError
from rewriter.graph.onnx import TensorSpec

SPECS = [
    TensorSpec("ids", np.dtype(np.int64), ("batch", "sequence")),
    TensorSpec("keep", np.dtype(np.bool_), ("batch", "sequence")),
    TensorSpec("pixels", np.dtype(np.float16), ("batch", 3)),
]
SHAPES = {"ids": (4, 32), "keep": (4, 32), "pixels": (4, 3)}


def test_ranges_dtypes_and_seed_are_respected():
    drawn, again, other = (draw_inputs(SPECS, SHAPES, {"ids": (5, 9)}, seed) for seed in (1, 1, 2))
    assert {name: (array.dtype, array.shape) for name, array in drawn.items()} == {
        spec.name: (spec.dtype, SHAPES[spec.name]) for spec in SPECS
    }
    assert set(np.unique(drawn["ids"])) == {5, 6, 7, 8}
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)
    assert not np.array_equal(drawn["ids"], other["ids"])


def test_what_is_looked_up_nowhere_is_a_padding_mask():
    keep = draw_inputs(SPECS, SHAPES, {"ids": (0, 9)})["keep"]
    assert keep[0].all() and keep[:, :16].all() and not keep.all()
    assert not (~keep[:, :-1] & keep[:, 1:]).any()


def test_a_missing_shape_is_asked_for():
    with pytest.raises(OptionError, match=r"sizes of input pixels: float16.* are not known.*--shape pixels="):
        draw_inputs(SPECS, {"ids": (1, 2), "keep": (1, 2)}, {})
