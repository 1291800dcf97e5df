"""NNCF's quantisation after training: activations by ranges seen on samples, weights per channel, outliers smoothed."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewriter.core.errors import DataError, ModelError

if TYPE_CHECKING:
    import openvino

MOST_SAMPLES = 300  # what NNCF takes by default


def quantised(model: openvino.Model, inputs: list[str], samples: Path) -> openvino.Model:
    """`model` in int8; `inputs` are the names of its inputs in order, `samples` an ``.npz`` of them, samples first.

    Samples are fed one at a time. Raises `DataError` where an input has none, `ModelError` where NNCF gives up.
    """
    nncf = _nncf()
    with np.load(samples, allow_pickle=False) as archive:
        missing = [name for name in inputs if name not in archive.files]
        if missing:
            raise DataError(f"the samples have no values for input {missing[0]!r}", f"Give {', '.join(inputs)}")
        arrays = [archive[name][:MOST_SAMPLES] for name in inputs]
    count = min(map(len, arrays))
    if not count:
        raise DataError("there is no sample to calibrate on", "Give data with calibration samples")
    feeds = [{i: array[row : row + 1] for i, array in enumerate(arrays)} for row in range(count)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=count)
    except (RuntimeError, ValueError, KeyError, nncf.InternalError, nncf.ValidationError) as error:
        raise ModelError(f"NNCF could not quantise the model: {error}", "Use another runtime") from error


def _nncf() -> Any:
    """The package, without what it would send home."""
    # It looks for openvino_telemetry once, on import, and sends no events where that is not installed.
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import nncf
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    nncf.set_log_level(logging.ERROR)
    return nncf
