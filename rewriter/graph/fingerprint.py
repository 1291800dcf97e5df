"""A name for the content of a model: equal for equal structure, names, attributes and weights, in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir


def fingerprint_model(model: ir.Model) -> str:
    """sha256 in hex. Names of nodes, documentation and metadata do not count."""
    digest = hashlib.sha256()
    for domain, version in sorted(model.opset_imports.items()):
        _text(digest, "import", domain, version)
    _graph(digest, model.graph)
    return digest.hexdigest()


def fingerprint_array(array: np.ndarray) -> str:
    """sha256 of one array: dtype, shape and bytes."""
    digest = hashlib.sha256()
    _array(digest, array)
    return digest.hexdigest()


def _graph(digest: Any, graph: ir.Graph) -> None:
    _values(digest, "inputs", graph.inputs)
    _values(digest, "outputs", graph.outputs)
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        _text(digest, "weight", name)
        if tensor is not None:
            _tensor(digest, tensor)
    for node in graph:
        _text(digest, "node", node.domain, node.op_type, node.overload)
        _text(digest, *[None if value is None else value.name for value in node.inputs])
        _text(digest, *[value.name for value in node.outputs])
        for name in sorted(node.attributes):
            digest_attribute(digest, node.attributes[name])


def _values(digest: Any, label: str, values: Iterable[ir.Value]) -> None:
    for value in values:
        _text(digest, label, value.name, value.dtype, value.shape)


def digest_attribute(digest: Any, attribute: ir.Attr) -> None:
    """Add an attribute of a node to a hash."""
    _text(digest, "attribute", attribute.name, attribute.type)
    if attribute.is_ref():
        _text(digest, attribute.ref_attr_name)
    elif attribute.type == ir.AttributeType.GRAPH:
        _graph(digest, attribute.as_graph())
    elif attribute.type == ir.AttributeType.GRAPHS:
        for graph in attribute.as_graphs():
            _graph(digest, graph)
    elif attribute.type == ir.AttributeType.TENSOR:
        _tensor(digest, attribute.as_tensor())
    elif attribute.type == ir.AttributeType.TENSORS:
        for tensor in attribute.as_tensors():
            _tensor(digest, tensor)
    else:
        _text(digest, repr(attribute.value))


def _tensor(digest: Any, tensor: ir.TensorProtocol) -> None:
    _text(digest, tensor.dtype, list(tensor.shape))
    if tensor.dtype == ir.DataType.STRING:
        _text(digest, *np.asarray(tensor.numpy()).reshape(-1).tolist())
        return
    _bytes(digest, np.asarray(tensor.numpy()))


def _array(digest: Any, array: np.ndarray) -> None:
    _text(digest, array.dtype, list(array.shape))
    _bytes(digest, array)


def _bytes(digest: Any, array: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _text(digest: Any, *parts: Any) -> None:
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    for part in parts:
        text = str(part).encode()
        digest.update(f"{len(text)}:".encode())
        digest.update(text)
    digest.update(b";")
