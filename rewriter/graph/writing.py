"""Writing a model so that a reader sees the old file or the new one, never a half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from rewriter.core.errors import ModelError, OutputError
from rewriter.graph.fingerprint import fingerprint_model
from rewriter.graph.quiet import quiet_onnx_ir

STANDARD_DOMAINS = ("", "ai.onnx")
# ONNX Runtime's optimizer writes these into models of any opset; the checker knows neither before 17
UNCHECKED = frozenset(("LayerNormalization", "SimplifiedLayerNormalization"))


def write_model(model: ir.Model, path: Path, external_above_bytes: int) -> Path:
    """Write `model` to `path` atomically, its weights beside it when together they exceed the limit in bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_onnx_ir():
            model = _described_in_full(model)
            if _weight_bytes(model) > external_above_bytes:
                return _write_external(model, path)
            return _write_single(model, path)
    except OSError as problem:
        raise OutputError(f"cannot write {path}: {problem.strerror or problem}", "Choose another place") from problem


def _described_in_full(model: ir.Model) -> ir.Model:
    """The same model without notes on values of no known type: they would be written as descriptions without one."""

    def bare(one: ir.Model) -> list[ir.Value]:
        values = [value for graph in one.graphs() for node in graph for value in node.outputs]
        return [value for value in values if value.type is None and (value.metadata_props or value.doc_string)]

    if not bare(model):
        return model
    copy = model.clone()
    for value in bare(copy):
        value.metadata_props.clear()
        value.doc_string = None
    return copy


def _weight_bytes(model: ir.Model) -> int:
    graphs = model.graphs()
    return sum(v.const_value.nbytes for g in graphs for v in g.initializers.values() if v.const_value is not None)


def _write_single(model: ir.Model, path: Path) -> Path:
    try:
        proto = ir.to_proto(_embedded(model))
    except ir.serde.SerdeError as problem:
        raise ModelError(f"the graph cannot be written as ONNX: {problem}", "Export the model again") from problem
    _check(proto, model)
    replace_bytes(path, proto.SerializeToString())
    return path


def _embedded(model: ir.Model) -> ir.Model:
    """The same model with external weights as ordinary tensors: a relative path would point nowhere from elsewhere."""
    values = [v for g in model.graphs() for v in g.initializers.values()]
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in values):
        return model
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    return copy


def _write_external(model: ir.Model, path: Path) -> Path:
    old = sorted(path.parent.glob(f"{path.name}*.data"))
    # The model file is replaced last, so it must never point to data that is newer than itself: another name then.
    data_name = f"{path.name}.{fingerprint_model(model)[:12]}.data" if old else f"{path.name}.data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        ir.save(model, Path(folder) / path.name, external_data=data_name)
        if _standard_only(model):
            _checked(lambda: onnx.checker.check_model(str(Path(folder) / path.name)))
        (Path(folder) / data_name).replace(path.parent / data_name)
        (Path(folder) / path.name).replace(path)
    for stale in old:
        if stale.name != data_name:
            stale.unlink()
    return path


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one in the same folder; on any failure the old file stays."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _standard_only(model: ir.Model) -> bool:
    known = frozenset() if model.opset_imports.get("", 1) >= 17 else UNCHECKED
    nodes = [node for graph in model.graphs() for node in graph]
    return all(node.domain in STANDARD_DOMAINS and node.op_type not in known for node in nodes)


def _check(proto: onnx.ModelProto, model: ir.Model) -> None:
    if _standard_only(model):
        _checked(lambda: onnx.checker.check_model(proto))


def _checked(check: object) -> None:
    assert callable(check)
    try:
        check()
    except onnx.checker.ValidationError as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(f"the graph to be written is not valid ONNX: {first}", "Report this as a bug") from problem
