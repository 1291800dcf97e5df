"""Saving: whole or not at all, valid, and with its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter.core.errors import ModelError, OutputError
from rewriter.graph.onnx import OnnxGraph, load
from tests.graph.files import external, proto_of, written
from tests.graph.harness import numbers


def test_save_and_load_again(tmp_path: Path) -> None:
    proto = proto_of()
    proto.metadata_props.add(key="provenance", value="here")
    graph = load(written(tmp_path, proto))
    saved = graph.save(tmp_path / "out" / "copy.onnx")
    again = load(saved)
    assert again.fingerprint() == graph.fingerprint()
    assert again.model.metadata_props == {"provenance": "here"}
    assert [path.name for path in saved.parent.iterdir()] == ["copy.onnx"]
    onnx.checker.check_model(onnx.load(saved), full_check=True)


def test_save_carries_external_weights_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    graph = load(external(tmp_path / "in"))
    saved = graph.save(tmp_path / "out" / "model.onnx")
    (tmp_path / "in" / "weights.bin").unlink()
    np.testing.assert_array_equal(load(saved).constant("w"), [1, 2, 3])


def large(folder: Path, weight: np.ndarray) -> OnnxGraph:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 64]) for name in "xy"]
    inner = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(weight, "w")])
    return load(written(folder, helper.make_model(inner, ir_version=8)))


def test_large_weights_go_beside_the_file(tmp_path: Path) -> None:
    weight = numbers(64, 64)
    graph = large(tmp_path, weight)
    saved = graph.save(tmp_path / "out" / "model.onnx", external_above_bytes=1000)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert saved.stat().st_size < 1000
    again = load(saved)
    np.testing.assert_array_equal(again.constant("w"), weight)
    assert again.fingerprint() == graph.fingerprint()


def test_large_weights_written_over_others_never_mix_with_them(tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.onnx"
    large(tmp_path, numbers(64, 64)).save(path, external_above_bytes=1000)
    before = load(path)
    after = large(tmp_path, numbers(64, 64, seed=1))
    after.save(path, external_above_bytes=1000)
    assert len(list(path.parent.iterdir())) == 2
    np.testing.assert_array_equal(load(path).constant("w"), numbers(64, 64, seed=1))
    np.testing.assert_array_equal(before.constant("w"), numbers(64, 64))  # still mapped
    load(path).save(path, external_above_bytes=1000)
    assert load(path).fingerprint() == after.fingerprint()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    path = graph.save(tmp_path / "kept.onnx")
    before = path.read_bytes()
    graph.topological()[-1].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="not valid ONNX"):
        graph.save(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.onnx", "model.onnx"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        graph.save(tmp_path / "file" / "model.onnx")


def test_notes_on_values_of_unknown_type_are_left_out(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    value = next(value for node in graph.topological() for value in node.outputs if not value.is_graph_output())
    value.type = value.shape = None
    value.metadata_props["note"] = "from an exporter"
    saved = onnx.load(graph.save(tmp_path / "again.onnx"))
    assert value.name not in [entry.name for entry in saved.graph.value_info]
    assert value.metadata_props
