"""Rotary positions: the kernel where it serves, operators of Relax elsewhere, from heads and from flat projections."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from rewriter.graph.composites import COMPOSITE_DOMAIN
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.compile import lower
from tests.runtimes.tvm.harness import assert_same, numbers, target


def turned(x: tuple[int, ...], heads: int, table: tuple[int, ...], size: int, interleaved: int) -> OnnxGraph:
    """Heads split where x has rank 3, then turned."""
    nodes, source = [], "x"
    if len(x) == 3:
        nodes.append(helper.make_node("SplitHeads", ["x"], ["parted"], domain=COMPOSITE_DOMAIN, heads=heads))
        source = "parted"
    attributes = {"size": size, "interleaved": interleaved, "sign": -1}
    nodes.append(helper.make_node("Rotary", [source, "cos", "sin"], ["y"], domain=COMPOSITE_DOMAIN, **attributes))
    shapes = {"x": x, "cos": table, "sin": table}
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    made = helper.make_graph(nodes, "rotary", infos, [helper.make_empty_tensor_value_info("y")])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(COMPOSITE_DOMAIN, 1)]
    return OnnxGraph(ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9)))


@pytest.mark.parametrize(("x", "table", "size", "interleaved", "kernel"), [
    ((2, 5, 96), (1, 1, 5, 32), 32, 0, True),
    ((2, 5, 96), (2, 1, 5, 24), 24, 0, True),  # part of a head, tables per item, vectors of 4
    ((2, 3, 7, 16), (7, 16), 16, 0, True),
    ((2, 3, 7, 16), (1, 3, 1, 8), 8, 0, True),
    ((2, 5, 96), (5, 32), 32, 1, False),  # neighbours
    ((2, 5, 90), (5, 30), 30, 0, False),  # halves of 15
])  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_turns_as_the_interpreter_does(
    x: tuple[int, ...], table: tuple[int, ...], size: int, interleaved: int, kernel: bool, threads: int
) -> None:
    model = turned(x, 3, table, size, interleaved)
    feeds = {"x": numbers(*x, seed=1), "cos": numbers(*table, seed=2), "sin": numbers(*table, seed=3)}
    module = lower(model, [{name: array.shape for name, array in feeds.items()}], target(threads))
    assert any(str(name).startswith("rotary") for name in module.work) == kernel
    assert_same(model, feeds, threads=threads)
