"""Data files: what fits is read, and everything that does not has its own sentence."""

import pickle
import zipfile

import numpy as np
import pytest

from rewriter.calibration.data import load_data
from rewriter.core.errors import DataError
from rewriter.graph.onnx import TensorSpec

SAMPLES, TOKENS = 40, 6
IDS = TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence"))
MASK = TensorSpec("attention_mask", np.dtype(np.int64), ("batch", "sequence"))
PIXELS = TensorSpec("pixels", np.dtype(np.float32), ("batch", 3, 4))


def text_arrays(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "input_ids": rng.integers(0, 99, (SAMPLES, TOKENS)),
        "attention_mask": np.ones((SAMPLES, TOKENS), dtype=np.int64),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def saved(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def load_text(tmp_path, **changes):
    return load_data(saved(tmp_path, **text_arrays(**changes)), [IDS, MASK])


def load_pixels(tmp_path, array):
    return load_data(saved(tmp_path, pixels=array), [PIXELS])


def test_arrays_and_annotations_are_read(tmp_path):
    numbers = np.arange(SAMPLES)
    data = load_text(
        tmp_path, labels=numbers % 3 - 1, split=numbers % 3, group=np.array([f"d{i // 2}" for i in numbers])
    )
    assert len(data) == SAMPLES and set(data.inputs) == {"input_ids", "attention_mask"}
    assert data.labels.tolist() == (numbers % 3 - 1).tolist() and data.split.max() == 2
    assert len(np.unique(data.group)) == SAMPLES // 2 and data.group[0] == data.group[1] != data.group[2]
    assert data.axes["input_ids"] == ("batch", "sequence")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64, np.bool_])
def test_whole_numbers_are_cast_where_no_value_changes(tmp_path, dtype):
    ids = np.ones((SAMPLES, TOKENS), dtype=dtype)
    data = load_text(tmp_path, input_ids=ids)
    assert data.inputs["input_ids"].dtype == np.int64 and (data.inputs["input_ids"] == 1).all()


def test_wide_floats_are_rounded(tmp_path):
    data = load_pixels(tmp_path, np.random.default_rng(0).standard_normal((SAMPLES, 3, 4)))
    assert data.inputs["pixels"].dtype == np.float32


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"data file .*absent\.npz does not exist"):
        load_data(tmp_path / "absent.npz", [IDS])


def test_an_unknown_type(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"unknown type '\.csv'"):
        load_data(tmp_path / "data.csv", [IDS])


@pytest.mark.parametrize("content", [b"", b"not a zip archive", b"PK\x03\x04 torn"])
def test_not_an_npz(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(path, [IDS])


def test_a_truncated_npz(tmp_path):
    path = saved(tmp_path, **text_arrays())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(path, [IDS, MASK])


def test_an_array_larger_than_its_file(tmp_path):
    path = tmp_path / "data.npz"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999, 6), }"
    padded = header + b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids.npy", b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded)
    with pytest.raises(DataError, match=r"cannot be read as \.npz|is damaged"):
        load_data(path, [IDS])


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "data.npz"
    np.savez(path, input_ids=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="holds pickled Python objects, which are never loaded"):
        load_data(path, [IDS])
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(path, [IDS])


def test_a_missing_name_is_named_with_what_exists(tmp_path):
    with pytest.raises(
        DataError, match=r"has no array for input 'attention_mask'; it holds 'input_ids'.*Name the arrays"
    ):
        load_text(tmp_path, attention_mask=None)


def test_an_unknown_name_is_named(tmp_path):
    with pytest.raises(DataError, match="has 'label', which is no input of the model"):
        load_text(tmp_path, label=np.zeros(SAMPLES))


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.ones((SAMPLES, TOKENS)), r"'input_ids' is float64, the model takes int64.*astype\('int64'\)"),
        (np.full((SAMPLES, TOKENS), 2**63 + 5, dtype=np.uint64), "'input_ids' is uint64, the model takes int64"),
        (np.full((SAMPLES, TOKENS), "word"), "'input_ids' is <U4, the model takes int64"),
    ],
)
def test_a_wrong_dtype(tmp_path, array, sentence):
    with pytest.raises(DataError, match=sentence):
        load_text(tmp_path, input_ids=array)


def test_whole_numbers_are_no_floats(tmp_path):
    with pytest.raises(DataError, match="'pixels' is int64, the model takes float32"):
        load_pixels(tmp_path, np.ones((SAMPLES, 3, 4), dtype=np.int64))


def test_a_wrong_number_of_axes(tmp_path):
    with pytest.raises(
        DataError, match=r"'pixels' has 2 axes \(40, 12\), the model takes pixels: float32\[batchx3x4\]"
    ):
        load_pixels(tmp_path, np.ones((SAMPLES, 12), dtype=np.float32))


def test_a_fixed_axis_that_does_not_fit(tmp_path):
    with pytest.raises(DataError, match="axis 2 of 'pixels' is 5, the model takes 4"):
        load_pixels(tmp_path, np.ones((SAMPLES, 3, 5), dtype=np.float32))


def test_axes_of_one_name_differ(tmp_path):
    with pytest.raises(DataError, match="axis 'sequence' is 6 in 'input_ids' but 7 in 'attention_mask'"):
        load_text(tmp_path, attention_mask=np.ones((SAMPLES, 7), dtype=np.int64))


def test_numbers_of_samples_differ(tmp_path):
    with pytest.raises(DataError, match="different numbers of samples: 'input_ids' 40, 'attention_mask' 39"):
        load_text(tmp_path, attention_mask=np.ones((39, TOKENS), dtype=np.int64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, bad):
    array = np.zeros((SAMPLES, 3, 4), dtype=np.float32)
    array[17, 1, 2] = bad
    with pytest.raises(DataError, match="'pixels' holds NaN or infinity, first in sample 17"):
        load_pixels(tmp_path, array)


def test_too_few_samples(tmp_path):
    few = {name: value[:31] for name, value in text_arrays().items()}
    with pytest.raises(DataError, match=r"31 samples are too few.*at least 32"):
        load_text(tmp_path, **few)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": np.zeros(5, dtype=int)}, r"'labels' has shape \(5,\).*\(40,\)"),
        ({"labels": np.zeros(SAMPLES)}, "'labels' is float64.*whole numbers"),
        ({"labels": np.full(SAMPLES, -2)}, "'labels' holds -2.*-1 means no label"),
        ({"split": np.full(SAMPLES, 3)}, r"'split' holds \[3\].*0 to calibrate"),
        ({"group": np.zeros((SAMPLES, 2), dtype=int)}, r"'group' has shape \(40, 2\)"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        load_text(tmp_path, **changes)
