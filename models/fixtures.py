"""Packs of tiny exported graphs for the tests: structure as exported, weights drawn again when a pack is opened.

What is recognised does not depend on the numbers in weights, so a pack keeps none that merely multiply or embed. A
graph that says the same as one in another pack (the same operators with the same meaning, the opset number aside) is
only named, and a cell that the exporter could not write stands there with the exporter's words. All graphs of a pack
are compressed as one, because they repeat each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

DRAWN = "drawn"
SMALLEST = 256
INDEX = "index.json"
_WEIGHT_INPUTS = {"MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "Gather": (0,), "Transpose": (0,), "Einsum": (0, 1)}
_WEIGHT_INPUTS |= {"Slice": (0,), "Identity": (0,), "Cast": (0,)}
# of ONNX Runtime; no operator of the same name takes a constant in these places
_WEIGHT_INPUTS |= {"Attention": (1,), "FusedMatMul": (0, 1), "EmbedLayerNormalization": (2, 3, 4)}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
# From opset 18 to 24 the other operators of exported graphs gained element types and rare attributes, no new meaning.
_MEANING_SETTLED = 18
_MEANING_CHANGED = frozenset(["AveragePool", "GridSample", "Pad", "Resize", "TopK"])


@dataclass(frozen=True)
class Pack:
    """Models by cell name; `same` names, for cells without a graph, the cell whose graph they share; `failed` holds
    what the exporter said where it wrote none."""

    models: Mapping[str, onnx.ModelProto]
    same: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the numbers of large float weights that only multiply or embed, and without notes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    plain = _plain_weights(copy)
    for name, tensor in _tensors(copy):
        tensor.ClearField("doc_string")
        if name in plain and tensor.data_type in _FLOATS and int(np.prod(tensor.dims)) >= SMALLEST:
            for content in ("raw_data", "float_data", "double_data", "int32_data"):
                tensor.ClearField(content)
            tensor.doc_string = DRAWN
    del copy.graph.value_info[:]
    for noted in (*copy.graph.node, *copy.graph.input, *copy.graph.output, copy.graph, copy):
        noted.ClearField("doc_string")
        del noted.metadata_props[:]
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


def write_pack(path: Path, pack: Pack) -> None:
    """Write stripped models into one file, in order of their names and without dates, so that packs can be compared."""
    index = {"same": dict(sorted(pack.same.items())), "failed": dict(sorted(pack.failed.items()))}
    files = {INDEX: json.dumps(index, indent=1).encode()}
    for name, model in sorted(pack.models.items()):
        files[f"{name}.onnx"] = stripped(model).SerializeToString(deterministic=True)
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def read_pack(path: Path) -> Pack:
    """The pack of a file, weights drawn."""
    files: dict[str, bytes] = {}
    with tarfile.open(path, "r:xz") as archive:
        for entry in archive:
            stream = archive.extractfile(entry)
            assert stream is not None
            files[entry.name] = stream.read()
    index = json.loads(files.pop(INDEX))
    models = {name.removesuffix(".onnx"): filled(onnx.load_model_from_string(data)) for name, data in files.items()}
    return Pack(models, index["same"], index["failed"])


def meaning(model: onnx.ModelProto) -> str:
    """A digest of what a graph says: equal if the same operators work on the same values in the same order.

    Names, the numbers of large weights and the opset as far as it changes nothing are left out.
    """
    model = stripped(model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    names: dict[str, str] = {"": ""}
    digest = hashlib.sha256(str(sorted((d, v) for d, v in opsets.items() if d)).encode())
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def known(name: str) -> str:
        if name not in names:
            names[name] = str(len(names))
            if name in constants:
                tensor = constants[name]
                digest.update(f"{tensor.data_type}{list(tensor.dims)}{tensor.doc_string}".encode())
                digest.update(numpy_helper.to_array(tensor).tobytes() if tensor.doc_string != DRAWN else b"")
        return names[name]

    for value in (*model.graph.input, *model.graph.output):
        digest.update(known(value.name).encode() + value.type.SerializeToString(deterministic=True))
    for node in model.graph.node:
        words = [node.domain, node.op_type, _version(node, opsets), *map(known, node.input), "->"]
        digest.update(" ".join([*words, *map(known, node.output)]).encode())
        for attribute in sorted(node.attribute, key=lambda item: item.name):
            digest.update(attribute.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _version(node: onnx.NodeProto, opsets: Mapping[str, int]) -> str:
    """The opset in which the operator got its present meaning; for other domains all of them are one."""
    if node.domain:
        return ""
    opset = opsets[""] if node.op_type in _MEANING_CHANGED else min(opsets[""], _MEANING_SETTLED)
    try:
        return str(onnx.defs.get_schema(node.op_type, opset).since_version)
    except onnx.defs.SchemaError:  # an operator that came later
        return "later"


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
