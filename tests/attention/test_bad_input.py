"""Graphs that are valid but absurd, or that do not mean to be run: a reason, never a crash, a hang or a full memory."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from rewriter.attention.judge import Judge
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.onnx import load
from tests.attention import exported

ONE = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
YES = helper.make_tensor("yes", TensorProto.BOOL, [], [True])


def found(folder: Path, nodes: list[onnx.NodeProto], sizes: list[int | str], *tensors: onnx.TensorProto):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    graph = helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return recognise(load(folder / "model.onnx"))


def test_live_dropout_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Dropout", ["x", "one", "yes"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"], axis=-1),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["p", "t"], ["y"]),
    ]
    (entry,) = found(tmp_path, nodes, ["batch", "tokens", 8], ONE, YES).unrecognised
    assert (entry.node, entry.refusal.code) == ("p", "no-feeds")
    assert "export the model after model.eval()" in entry.refusal.why


@pytest.mark.parametrize("sizes", [[0, 0, 8], [2**30, 1, 2], [0], []])
def test_sizes_that_nothing_can_be_drawn_for(sizes: list[int], tmp_path: Path) -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["p"]), helper.make_node("MatMul", ["p", "x"], ["y"])]
    assert not found(tmp_path, nodes, list(sizes)).sites


def test_a_loop_without_end_is_left(tmp_path: Path) -> None:
    state = [helper.make_tensor_value_info("going", 9, []), helper.make_tensor_value_info("v", 1, None)]
    after = [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("w", 1, None)]
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info("i", 7, []), *state],
        after,
    )
    loop = helper.make_node("Loop", ["", "yes", "x"], ["z"], body=body)
    softmax = helper.make_node("Softmax", ["z"], ["y"])
    (entry,) = found(tmp_path, [loop, softmax], [3, 4], YES).unrecognised
    assert "more than 20000 rounds" in entry.refusal.why


def test_vast_values_are_refused_where_they_arise(tmp_path: Path) -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [2**20, 2**20, 2**10])
    nodes = [helper.make_node("Tile", ["x", "shape"], ["z"]), helper.make_node("Softmax", ["z"], ["y"])]
    (entry,) = found(tmp_path, nodes, [1, 2, 3], shape).unrecognised
    assert entry.refusal.code == "no-feeds"


@pytest.mark.parametrize("step", ["judge", "together"])
def test_a_check_that_breaks_down_takes_the_state_and_nothing_else(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Judge, step, broken)
    sites = recognise(exported.vit()).sites
    assert len(sites) == 4
    for site in sites:
        assert site.state is State.MAPPED
        assert [(problem.code, problem.why) for problem in site.problems] == [
            ("probe-failed", "it could not be probed (RuntimeError: out of luck)")
        ]
