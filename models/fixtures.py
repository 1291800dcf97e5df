"""Packs of tiny exported graphs for the tests: structure as exported, weights drawn again when a pack is opened.

What is recognised does not depend on the numbers in weights, so a pack keeps none that merely multiply or embed; that
makes hundreds of graphs fit in a file of a megabyte.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

DRAWN = "drawn"
SMALLEST = 256
_WEIGHT_INPUTS = {"MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "Gather": (0,), "Transpose": (0,), "Einsum": (0, 1)}
_WEIGHT_INPUTS |= {"Slice": (0,), "Identity": (0,)}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the numbers of large float weights that only multiply or embed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    plain = _plain_weights(copy)
    for name, tensor in _tensors(copy):
        if name in plain and tensor.data_type in _FLOATS and int(np.prod(tensor.dims)) >= SMALLEST:
            for field in ("raw_data", "float_data", "double_data", "int32_data"):
                tensor.ClearField(field)
            tensor.doc_string = DRAWN
    del copy.graph.value_info[:]
    for node in copy.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    return copy


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with drawn numbers where `stripped` left none; always the same ones."""
    for name, tensor in _tensors(model):
        if tensor.doc_string == DRAWN:
            random = np.random.default_rng(zlib.crc32(name.encode()))
            shape = tuple(tensor.dims)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            drawn = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    return model


def write_pack(path: Path, models: dict[str, onnx.ModelProto]) -> None:
    """Write stripped models into one file, in order of their names and without dates, so that packs can be compared."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pack:
        for name, model in sorted(models.items()):
            entry = zipfile.ZipInfo(f"{name}.onnx", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            pack.writestr(entry, stripped(model).SerializeToString(deterministic=True))


def read_pack(path: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Names and models of a pack, weights drawn."""
    with zipfile.ZipFile(path) as pack:
        for name in pack.namelist():
            yield name.removesuffix(".onnx"), filled(onnx.load_model_from_string(pack.read(name)))


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Constants by the name of their value: initialisers and Constant nodes."""
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            yield node.output[0], node.attribute[0].t


def _plain_weights(model: onnx.ModelProto) -> set[str]:
    names = {name for name, _ in _tensors(model)}
    read: dict[str, bool] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in names:
                good = position in _WEIGHT_INPUTS.get(node.op_type, ())
                read[name] = read.get(name, True) and good
    return {name for name, good in read.items() if good}
