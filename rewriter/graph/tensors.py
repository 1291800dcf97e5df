"""Between ONNX dtypes, numpy arrays and torch tensors, without copies where memory can be shared."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.core.errors import ModelError

_T = ir.DataType
TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.BOOL: torch.bool,
    _T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _T.FLOAT8E5M2: torch.float8_e5m2,
    _T.INT4: torch.int8,  # kept one to a byte
    _T.UINT4: torch.uint8,
}
_REINTERPRETED = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
}
_WIDENED = {np.dtype(ml_dtypes.int4): np.int8, np.dtype(ml_dtypes.uint4): np.uint8}


def torch_dtype(kind: int | ir.DataType) -> torch.dtype:
    """The torch dtype of an ONNX dtype number; raises `ModelError` for strings, complex and unknown ones."""
    try:
        return TORCH_DTYPES[ir.DataType(int(kind))]
    except (KeyError, ValueError) as problem:
        raise ModelError(f"dtype {kind} cannot be computed with", "Export with ordinary number types") from problem


def to_torch(array: np.ndarray, upcast: torch.dtype | None = None) -> Tensor:
    """A tensor over the array's own memory where possible; floats become `upcast` if given.

    The tensor must not be written to: the memory may be a file's.
    """
    if array.dtype in _REINTERPRETED:
        bits, dtype = _REINTERPRETED[array.dtype]
        tensor = _share(np.ascontiguousarray(array).view(bits)).view(dtype)
    elif array.dtype in _WIDENED:
        tensor = _share(array.astype(_WIDENED[array.dtype]))
    elif array.dtype.kind in "OSU":
        raise ModelError("a string tensor cannot be computed with", "Leave text processing outside the model")
    else:
        tensor = _share(array)
    return tensor.to(upcast) if upcast is not None and tensor.is_floating_point() else tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The array of a tensor; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _share(array: np.ndarray) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only memory: tensors here are never written in place
        return torch.from_numpy(np.asarray(array))
