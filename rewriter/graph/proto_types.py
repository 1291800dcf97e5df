"""Types in an ONNX message: texts are text, inputs are tensors, attributes are what their operator's schema says."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]

from rewriter.core.errors import ModelError
from rewriter.graph.proto_walk import all_nodes, label

MAX_INPUT = 2**31  # elements, counting axes without a size as one
KNOWN_DTYPES = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
_AGAIN = "Export the model again"


def check_types(proto: onnx.ModelProto, file: Path) -> None:
    """Raise `ModelError` for the first input that is no tensor, and for operands and attributes missing or wrong."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in weights:
            _check_input(value, file)
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    for node in all_nodes(proto, functions=False):  # functions may import another version
        if node.domain in ("", "ai.onnx"):
            _check_attributes(node, opset, file)
            _check_operands(node, opset, file)


def check_texts(message: Any, file: Path) -> None:
    """Raise `ModelError` unless every text in a message is valid UTF-8: protobuf hands out bytes where it is not."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            texts = [value] if isinstance(value, (str, bytes)) else value
            if any(isinstance(text, bytes) for text in texts):
                raise ModelError(f"{file}: a {field.name} is not text", _AGAIN)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                if isinstance(inner, onnx.TensorProto):
                    _check_texts_of_tensor(inner, file)  # without touching its data
                else:
                    check_texts(inner, file)


def _check_texts_of_tensor(tensor: onnx.TensorProto, file: Path) -> None:
    texts = [tensor.name, *(part for entry in tensor.external_data for part in (entry.key, entry.value))]
    if any(isinstance(text, bytes) for text in texts):
        raise ModelError(f"{file}: the name or place of a weight is not text", _AGAIN)


def _check_input(value: onnx.ValueInfoProto, file: Path) -> None:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelError(f"{file}: the input {value.name!r} is not a tensor", "Export the model with tensor inputs")
    if value.type.tensor_type.elem_type not in KNOWN_DTYPES:
        raise ModelError(f"{file}: the input {value.name!r} has no known dtype", _AGAIN)
    sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.HasField("dim_value")]
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_INPUT:
        raise ModelError(f"{file}: the input {value.name!r} declares the impossible sizes {sizes}", _AGAIN)


def _check_attributes(node: onnx.NodeProto, opset: int, file: Path) -> None:
    expected = _schema(node.op_type, opset)
    if expected is None:
        return
    types, required = expected
    given = {attribute.name: attribute for attribute in node.attribute}
    for name in required:
        if name not in given:
            raise ModelError(f"{file}: node {label(node)} ({node.op_type}) lacks its attribute {name!r}", _AGAIN)
    for name, attribute in given.items():
        if name not in types:
            why = f"{file}: node {label(node)} ({node.op_type}) has the attribute {name!r}, unknown in opset {opset}"
            raise ModelError(why, _AGAIN)
        if attribute.type != types[name]:
            raise ModelError(f"{file}: attribute {name!r} of node {label(node)} has a wrong type", _AGAIN)


def _check_operands(node: onnx.NodeProto, opset: int, file: Path) -> None:
    for place in _required_operands(node.op_type, opset):
        if place >= len(node.input) or not node.input[place]:
            raise ModelError(f"{file}: node {label(node)} ({node.op_type}) lacks its input {place}", _AGAIN)


@cache
def _required_operands(operator: str, opset: int) -> tuple[int, ...]:
    """Places of the inputs that may not be left out; none for operators the standard does not have."""
    try:
        inputs = onnx.defs.get_schema(operator, opset, "").inputs
    except onnx.defs.SchemaError:
        return ()
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return tuple(place for place, formal in enumerate(inputs) if formal.option == single)


@cache
def _schema(operator: str, opset: int) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Attribute types by name, and the required ones; None for operators the standard does not have."""
    try:
        schema = onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None
    types = {name: _number(attribute.type) for name, attribute in schema.attributes.items()}
    return types, tuple(name for name, attribute in schema.attributes.items() if attribute.required)


def _number(kind: Any) -> int:
    return int(kind.value)  # the schema's own enumeration, with the numbers of AttributeProto
