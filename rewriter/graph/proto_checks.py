"""What must hold of an ONNX message before it is turned into a graph."""

from __future__ import annotations

from pathlib import Path

import onnx

from rewriter.core.errors import ModelError
from rewriter.graph.proto_functions import check_functions
from rewriter.graph.proto_tensors import check_tensor
from rewriter.graph.proto_types import check_texts, check_types
from rewriter.graph.proto_walk import all_graphs, all_nodes, all_tensors, label, subgraphs

KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", "rewriter")
_AGAIN = "Export the model again"


def check_proto(proto: onnx.ModelProto, file: Path) -> None:
    """Raise `ModelError` for the first problem found."""
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise ModelError(f"{file} is not an ONNX model", "Give a file that an ONNX exporter wrote")
    if not proto.graph.output:
        raise ModelError(f"{file}: the graph has no outputs", _AGAIN)
    check_texts(proto, file)
    _check_versions(proto, file)
    check_types(proto, file)
    check_functions(proto, file)
    _check_names(proto.graph, file, set(), "the graph")
    sparse = any(attribute.HasField("sparse_tensor") for node in all_nodes(proto) for attribute in node.attribute)
    if sparse or any(graph.sparse_initializer for graph in all_graphs(proto)):
        raise ModelError(f"{file} has sparse weights", "Export it with dense weights")
    for tensor in all_tensors(proto):
        check_tensor(tensor, file)


def _check_versions(proto: onnx.ModelProto, file: Path) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(f"{file} has IR version {proto.ir_version}, newest known is {onnx.IR_VERSION}", "Update onnx")
    imports = {entry.domain: entry.version for entry in proto.opset_import}
    standard = imports.get("", imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if standard > newest:
        raise ModelError(f"{file} uses opset {standard}, newest known is {newest}", f"Export with opset <= {newest}")
    functions = {(function.domain, function.name) for function in proto.functions}
    for node in all_nodes(proto):
        if node.domain in KNOWN_DOMAINS or (node.domain, node.op_type) in functions:
            continue
        raise ModelError(
            f"{file}: operator {node.domain}::{node.op_type} (node {label(node)}) is of an unknown domain",
            "Export with standard operators; custom operator libraries are never loaded",
        )
    if standard <= 0 and any(node.domain in ("", "ai.onnx") for node in all_nodes(proto)):
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
                raise ModelError(f"{file}: node {label(node)} reads {name!r}, which nothing defines", _AGAIN)
        for subgraph in subgraphs(node):
            _check_names(subgraph, file, known, f"a subgraph of node {label(node)}")
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
