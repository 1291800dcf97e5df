"""Stepping through a graph: the interpreter's values, overrides, fragments and bounded memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from rewriter.core.errors import DataError, ModelError
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Fragment, Stepper
from tests.graph.harness import graph_of, numbers

DEPTH = 12


def residual_graph(depth: int = DEPTH) -> OnnxGraph:
    """A chain of residual blocks ``r[i+1] = r[i] + tanh(r[i] @ w[i])``."""
    nodes, weights = [], []
    for i in range(depth):
        weights.append(numpy_helper.from_array(0.3 * numbers(8, 8, seed=i), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [f"r{i}", f"w{i}"], [f"h{i}"]),
            helper.make_node("Tanh", [f"h{i}"], [f"t{i}"]),
            helper.make_node("Add", [f"r{i}", f"t{i}"], [f"r{i + 1}"]),
        ]
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 8]) for name in ("r0", f"r{depth}")]
    inner = helper.make_graph(nodes, "chain", infos[:1], infos[1:], weights)
    return graph_of(helper.make_model(inner, ir_version=8))


def batches() -> list[dict[str, np.ndarray]]:
    return [{"r0": numbers(rows, 8, seed=rows)} for rows in (2, 5)]


def test_values_are_the_interpreters() -> None:
    graph = residual_graph()
    stepper = Stepper(graph, batches())
    assert stepper.batches == 2
    for index, feeds in enumerate(batches()):
        expected = Interpreter(graph).run(feeds, taps="all")
        for name in ("h0", "t5", "r12", "r3", "r0"):
            assert torch.equal(stepper.value(name, index), expected[name])
    assert torch.equal(stepper.value("w3", 0), Interpreter(graph).constants["w3"])


def test_only_what_is_asked_for_is_computed_and_only_once() -> None:
    stepper = Stepper(residual_graph(), batches())
    first = stepper.value("r2", 0)
    assert stepper.held(0) == {"r0", "h0", "t0", "r1", "h1", "t1", "r2"}
    assert stepper.held(1) == {"r0"}
    assert stepper.value("r2", 0) is first


def test_override_replaces_a_value_and_its_past_never_runs() -> None:
    graph = residual_graph()
    stepper = Stepper(graph, batches())
    replacement = torch.zeros(2, 8)
    stepper.override("t3", 0, replacement)
    changed = stepper.value("r4", 0)
    assert torch.equal(changed, stepper.value("r3", 0))
    assert "h3" not in stepper.held(0)
    stepper.override("r6", 1, torch.ones(5, 8))
    stepper.value("r7", 1)
    assert stepper.held(1) == {"r0", "r6", "h6", "t6", "r7"}
    with pytest.raises(ModelError, match="no value named"):
        stepper.override("ghost", 0, replacement)


def test_override_of_one_output_of_several_survives_the_others() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[2] y) { a, b = Split(x)  y = Add(a, b) }"""
    stepper = Stepper(graph_of(onnx.parser.parse_model(text)), [{"x": np.arange(4, dtype=np.float32)}])
    stepper.override("a", 0, torch.zeros(2))
    assert stepper.value("y", 0).tolist() == [2.0, 3.0]


def test_pruning_keeps_the_frontier_only() -> None:
    graph = residual_graph()
    stepper = Stepper(graph, batches())
    for index in range(2):
        stepper.value("t5", index)
    stepper.prune(["r12"])
    # What is left to compute starts from the residual stream and the branch that was not yet added to it.
    assert stepper.held(0) == {"r5", "t5"}
    expected = Interpreter(graph).run(batches()[0])["r12"]
    assert torch.equal(stepper.value("r12", 0), expected)


def test_walking_a_deep_graph_needs_the_memory_of_one_block() -> None:
    graph = residual_graph(40)
    stepper = Stepper(graph, [{"r0": numbers(50, 8)}])
    one = 50 * 8 * 4
    peak = 0
    for block in range(40):
        stepper.value(f"r{block + 1}", 0)
        peak = max(peak, stepper.held_bytes())
        stepper.prune(["r40"])
        assert stepper.held(0) == {f"r{block + 1}"}
    assert peak <= 4 * one


def test_pruned_tensors_are_really_freed() -> None:
    stepper = Stepper(residual_graph(), batches())
    alive = weakref.ref(stepper.value("h0", 0))
    stepper.value("r1", 0)
    stepper.prune(["r12"])
    gc.collect()
    assert alive() is None


def test_prune_one_batch_and_keep() -> None:
    stepper = Stepper(residual_graph(), batches(), keep=["t0"])
    for index in range(2):
        stepper.value("r2", index)
    stepper.prune(["r12"], batch=0)
    assert stepper.held(0) == {"r2", "t0"}
    assert "h0" in stepper.held(1)


def test_what_was_dropped_is_not_computed_from_nothing() -> None:
    stepper = Stepper(residual_graph(), batches())
    stepper.value("r4", 0)
    stepper.prune(["r12"])
    with pytest.raises(ModelError, match="'r0' was dropped"):
        stepper.value("t1", 0)


def fragment() -> Fragment:
    """``extra = relu(t1 @ k)``, on top of the graph's t1."""
    t1, k = ir.Value(name="t1"), ir.Value(name="k")
    product = ir.Node("", "MatMul", [t1, k], outputs=[ir.Value(name="inner")])
    relu = ir.Node("", "Relu", [product.outputs[0]], outputs=[ir.Value(name="extra")])
    return Fragment((product, relu), {"k": numbers(8, 3, seed=9)}, ("extra",))


def test_fragments_run_on_top_without_being_recorded() -> None:
    stepper = Stepper(residual_graph(), batches())
    extra = fragment()
    assert extra.reads() == ["t1"]
    found = stepper.run_fragment(extra, 0)
    expected = np.maximum(stepper.value("t1", 0).numpy() @ numbers(8, 3, seed=9), 0)
    np.testing.assert_allclose(found["extra"], expected, rtol=1e-5, atol=1e-6)
    assert "extra" not in stepper.held(0) and "inner" not in stepper.held(0)
    both = stepper.run_fragment(extra, 1, ["inner", "t1"])
    assert set(both) == {"inner", "t1"} and both["inner"].shape == (5, 3)


def test_double_precision() -> None:
    stepper = Stepper(residual_graph(), batches(), dtype=torch.float64)
    assert stepper.value("r12", 0).dtype == torch.float64
    assert stepper.run_fragment(fragment(), 0)["extra"].dtype == torch.float64


def test_batches_are_checked() -> None:
    with pytest.raises(DataError, match="'r0' is missing"):
        Stepper(residual_graph(), [{}])
