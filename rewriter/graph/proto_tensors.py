"""Tensors of an ONNX message: declared sizes against what is there, and external files that stay in their folder."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from rewriter.core.errors import ModelError
from rewriter.graph.proto_types import KNOWN_DTYPES

MAX_ELEMENTS = 2**40
_AGAIN = "Export the model again"
_BITS: dict[int, int] = {
    int(onnx.TensorProto.UINT4): 4,
    int(onnx.TensorProto.INT4): 4,
    int(onnx.TensorProto.FLOAT4E2M1): 4,
}


def check_tensor(tensor: onnx.TensorProto, file: Path) -> None:
    """Raise `ModelError` unless a tensor holds, or points to, exactly as much as its shape and dtype declare."""
    name = tensor.name or "a constant"
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims) or count > MAX_ELEMENTS:
        raise ModelError(f"{file}: {name} declares the impossible shape {list(tensor.dims)}", _AGAIN)
    if tensor.data_type not in KNOWN_DTYPES:
        raise ModelError(f"{file}: {name} has the unknown dtype {tensor.data_type}", _AGAIN)
    if tensor.data_type == onnx.TensorProto.STRING:
        found, expected = len(tensor.string_data), count
    elif tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, file, _byte_count(tensor, count))
        return
    elif tensor.HasField("raw_data"):
        found, expected = len(tensor.raw_data), _byte_count(tensor, count)
    else:
        found, expected = _field_count(tensor), _field_expected(tensor, count)
    if found != expected:
        raise ModelError(f"{file}: {name} of shape {list(tensor.dims)} has {found} of {expected} items", _AGAIN)


def _byte_count(tensor: onnx.TensorProto, count: int) -> int:
    if tensor.data_type in _BITS:
        return -(-count * _BITS[tensor.data_type] // 8)
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _field_count(tensor: onnx.TensorProto) -> int:
    kinds = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return max(len(kind) for kind in kinds)


def _field_expected(tensor: onnx.TensorProto, count: int) -> int:
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * count
    return -(-count * _BITS[tensor.data_type] // 8) if tensor.data_type in _BITS else count


def _check_external(tensor: onnx.TensorProto, file: Path, expected: int) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    data = external_file(file, location, tensor.name)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as problem:
        raise ModelError(f"{file}: {tensor.name!r} has an unreadable offset or length", _AGAIN) from problem
    if offset < 0 or length != expected:
        raise ModelError(f"{file}: {tensor.name!r} needs {expected} bytes but declares {length}", _AGAIN)
    size = data.stat().st_size
    if offset + length > size:
        raise ModelError(
            f"{data} is too short: {tensor.name!r} ends at byte {offset + length}, the file has {size}",
            "Copy the external data again, whole",
        )


def external_file(model: Path, location: str, name: str) -> Path:
    """The file an external tensor lives in; raises `ModelError` unless it lies in the model's folder and exists.

    A link may lead to where the model file itself really lies: that is how download caches are laid out.
    """
    try:
        data = model.parent / location
        roots = (model.parent.resolve(), model.resolve().parent)
        inside = bool(location) and any(data.resolve().is_relative_to(root) for root in roots)
        exists = data.is_file()
    except (ValueError, OSError) as problem:
        raise ModelError(f"{model}: {name!r} has an unusable external path {location!r}", _AGAIN) from problem
    if not inside or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(
            f"{model}: {name!r} is stored at {location!r}, outside the model's folder", "Put the data beside the model"
        )
    if not exists:
        raise ModelError(f"{data}, which holds {name!r}, is missing", "Copy the external data beside the model file")
    return data
