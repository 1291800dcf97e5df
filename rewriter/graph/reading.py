"""Reading a model file that nobody vouches for: every problem is named before anything is allocated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from rewriter.core.errors import ModelError
from rewriter.graph.function_opsets import align
from rewriter.graph.proto_checks import check_proto
from rewriter.graph.proto_tensors import external_file
from rewriter.graph.quiet import quiet_onnx_ir

_EXPORT_AGAIN = "Export the model again"
_MAX_FILE_BYTES = 2**31 - 1  # protobuf reads no larger message


def read_model(path: Path) -> tuple[ir.Model, Path]:
    """The checked model, functions inlined and nodes sorted, and the file it was read from."""
    file = find_file(path)
    proto = parse(file)
    check_proto(proto, file)
    return from_checked_proto(proto, file), file


def find_file(path: Path) -> Path:
    """`path` itself, or in a folder ``model.onnx``, else its only ONNX file."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"no model at {path}", "Give an .onnx file or a folder that holds model.onnx")
    if (path / "model.onnx").is_file():
        return path / "model.onnx"
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"the folder {path} holds no .onnx file", "Give an .onnx file or a folder with model.onnx")
    names = ", ".join(file.name for file in found[:5])
    raise ModelError(f"the folder {path} holds {len(found)} models ({names})", "Name the file you mean")


def parse(file: Path) -> onnx.ModelProto:
    """The protobuf message in a file, external data left alone."""
    try:
        size = file.stat().st_size
        if size == 0:
            raise ModelError(f"{file} is empty", _EXPORT_AGAIN)
        if size > _MAX_FILE_BYTES:
            raise ModelError(f"{file} is larger than 2 GB", "Export it with external data")
        content = file.read_bytes()
    except OSError as problem:
        raise ModelError(f"cannot read {file}: {problem.strerror or problem}", "Check the path and rights") from problem
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as problem:
        raise ModelError(f"{file} is truncated or not an ONNX file", _EXPORT_AGAIN) from problem
    return proto


def from_checked_proto(proto: onnx.ModelProto, file: Path) -> ir.Model:
    """The IR of a checked message. What the IR's own reader refuses becomes a `ModelError`."""
    try:
        with quiet_onnx_ir():
            return _convert(proto, file)
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(f"{file} is malformed: {problem}", _EXPORT_AGAIN) from problem


def _convert(proto: onnx.ModelProto, file: Path) -> ir.Model:
    model = ir.from_proto(proto)
    if "ai.onnx" in model.opset_imports:  # the long name of the standard domain
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    if model.functions:
        align(model)
        common.InlinePass()(model)
        common.RemoveUnusedFunctionsPass()(model)
    weights = _Weights(file)
    for graph in model.graphs():
        _sort(graph, file)
        weights.settle(graph)
    return model


class _Weights:
    """Weights where they stay: arrays instead of wrapped messages, which copy their bytes at every look, and views of
    one mapping per external file, which outlive the file's name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._mapped: dict[Path, np.memmap] = {}

    def settle(self, graph: ir.Graph) -> None:
        """Replace the tensors of a graph, in attributes too."""
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = self._settled(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, self._settled(attribute.as_tensor()))

    def _settled(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, ir.ExternalTensor):
            return self._external(tensor)
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype.bitwidth >= 8:
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        return tensor

    def _external(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        real = external_file(self.file, str(tensor.location), tensor.name or "").resolve()
        shape = [int(size) for size in tensor.shape.numpy()]
        if tensor.dtype.bitwidth < 8:  # packed: the library unpacks it
            name, base = tensor.name or "", real.parent
            return ir.ExternalTensor(
                real.name, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=name, base_dir=base
            )
        dtype, count = tensor.dtype.numpy(), math.prod(shape)
        if count == 0:
            return ir.Tensor(np.zeros(shape, dtype), dtype=tensor.dtype, name=tensor.name)
        if real not in self._mapped:
            self._mapped[real] = np.memmap(real, dtype=np.uint8, mode="r")
        array = np.frombuffer(self._mapped[real], dtype, count, tensor.offset or 0).reshape(shape)
        if not array.flags.aligned:
            array = array.copy()
        return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _sort(graph: ir.Graph, file: Path) -> None:
    try:
        graph.sort()
    except ValueError as problem:
        raise ModelError(f"{file}: the graph has a cycle", _EXPORT_AGAIN) from problem
