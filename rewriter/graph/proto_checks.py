"""What must hold of an ONNX message before it is turned into a graph: versions, names, sizes, external files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx

from rewriter.core.errors import ModelError

KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", "rewriter")
MAX_ELEMENTS = 2**40
_AGAIN = "Export the model again"
_BITS: dict[int, int] = {
    int(onnx.TensorProto.UINT4): 4,
    int(onnx.TensorProto.INT4): 4,
    int(onnx.TensorProto.FLOAT4E2M1): 4,
}


def check_proto(proto: onnx.ModelProto, file: Path) -> None:
    """Raise `ModelError` for the first problem found."""
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise ModelError(f"{file} is not an ONNX model", "Give a file that an ONNX exporter wrote")
    if not proto.graph.output:
        raise ModelError(f"{file}: the graph has no outputs", _AGAIN)
    _check_versions(proto, file)
    _check_names(proto.graph, file, set(), "the graph")
    if any(graph.sparse_initializer for graph in _graphs(proto)):
        raise ModelError(f"{file} has sparse weights", "Export it with dense weights")
    for tensor in _tensors(proto):
        _check_tensor(tensor, file)


def _check_versions(proto: onnx.ModelProto, file: Path) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(f"{file} has IR version {proto.ir_version}, newest known is {onnx.IR_VERSION}", "Update onnx")
    imports = {entry.domain: entry.version for entry in proto.opset_import}
    standard = imports.get("", imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if standard > newest:
        raise ModelError(f"{file} uses opset {standard}, newest known is {newest}", f"Export with opset <= {newest}")
    functions = {(function.domain, function.name) for function in proto.functions}
    for node in _nodes(proto):
        if node.domain in KNOWN_DOMAINS or (node.domain, node.op_type) in functions:
            continue
        raise ModelError(
            f"{file}: operator {node.domain}::{node.op_type} (node {_label(node)}) is of an unknown domain",
            "Export with standard operators; custom operator libraries are never loaded",
        )
    if standard <= 0 and any(node.domain in ("", "ai.onnx") for node in _nodes(proto)):
        raise ModelError(f"{file} does not say which opset it uses", _AGAIN)


def _check_names(graph: onnx.GraphProto, file: Path, outer: set[str], where: str) -> None:
    """Single assignment, and every value read is defined somewhere (order does not matter here)."""
    inputs = [value.name for value in graph.input]
    weights = [tensor.name for tensor in graph.initializer]
    produced = [name for node in graph.node for name in node.output if name]
    if "" in weights or "" in inputs:
        raise ModelError(f"{file}: {where} has an input or a weight without a name", _AGAIN)
    repeated = (
        _first_repeated(inputs)
        or _first_repeated([*weights, *produced])
        or _first_repeated([*(name for name in inputs if name not in weights), *produced])
    )
    if repeated:
        raise ModelError(f"{file}: {where} defines {repeated!r} more than once", _AGAIN)
    known = outer | {*inputs, *weights, *produced}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(f"{file}: node {_label(node)} reads {name!r}, which nothing defines", _AGAIN)
        for subgraph in _subgraphs(node):
            _check_names(subgraph, file, known, f"a subgraph of node {_label(node)}")
    for output in graph.output:
        if output.name not in known:
            raise ModelError(f"{file}: nothing computes the output {output.name!r} of {where}", _AGAIN)


def _first_repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_tensor(tensor: onnx.TensorProto, file: Path) -> None:
    name = tensor.name or "a constant"
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims) or count > MAX_ELEMENTS:
        raise ModelError(f"{file}: {name} declares the impossible shape {list(tensor.dims)}", _AGAIN)
    if tensor.data_type == onnx.TensorProto.STRING:
        found, expected = len(tensor.string_data), count
    elif tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, file, _byte_count(tensor, file, count))
        return
    elif tensor.HasField("raw_data"):
        found, expected = len(tensor.raw_data), _byte_count(tensor, file, count)
    else:
        found, expected = _field_count(tensor), _field_expected(tensor, file, count)
    if found != expected:
        raise ModelError(f"{file}: {name} of shape {list(tensor.dims)} has {found} of {expected} items", _AGAIN)


def _byte_count(tensor: onnx.TensorProto, file: Path, count: int) -> int:
    if tensor.data_type in _BITS:
        return -(-count * _BITS[tensor.data_type] // 8)
    try:
        return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError as problem:
        raise ModelError(f"{file}: {tensor.name!r} has the unknown dtype {tensor.data_type}", _AGAIN) from problem


def _field_count(tensor: onnx.TensorProto) -> int:
    kinds = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return max(len(kind) for kind in kinds)


def _field_expected(tensor: onnx.TensorProto, file: Path, count: int) -> int:
    _byte_count(tensor, file, count)
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


def _label(node: onnx.NodeProto) -> str:
    return repr(node.name or next((name for name in node.output if name), node.op_type))


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graph_nodes(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _graph_nodes(list(graph.node))


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from _graph_nodes(list(proto.graph.node))
    for function in proto.functions:
        yield from _graph_nodes(list(function.node))


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for node in _nodes(proto):
        yield from _subgraphs(node)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
