"""Whole graphs in number formats: what the interpreter says, with the instructions and without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.core.errors import UnsupportedOperator
from rewriter.graph.composites import composite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm import compile as compiling
from rewriter.runtimes.tvm.target import detect
from tests.runtimes.composite_graphs import constant, graph_of, single, tensor_input
from tests.runtimes.tvm.graphs import Encoder, feeds
from tests.runtimes.tvm.harness import numbers, run_graph, target

FLOAT = ir.DataType.FLOAT


def linear(precision: str, activation: str = "") -> OnnxGraph:
    constants = {"w": numbers(37, 50, seed=1), "b": numbers(50, seed=2)}
    shape = {"x": (np.float32, ("B", "S", 37))}
    return single("Linear", shape, constants, 20, precision=precision, activation=activation)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_one_layer_is_what_the_interpreter_says(precision: str, threads: int) -> None:
    x = {"x": numbers(2, 9, 37)}
    for activation in ("", "gelu"):
        graph = linear(precision, activation)
        wanted = Interpreter(graph).run(x)["y"].numpy()
        bound = 1e-4 if activation and precision == "int8" else 2e-6  # its GELU is as coarse as its operands allow
        assert relative(run_graph(graph, x, threads)["y"], wanted) < bound


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_without_the_instructions_the_meaning_stays(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, graph = {"x": numbers(2, 9, 37)}, linear(precision)
    wanted = Interpreter(graph).run(x)["y"].numpy()
    older = detect("llvm -mcpu=x86-64-v3") if "avx2" in target().features else replace(target(), features=())
    monkeypatch.setattr("tests.runtimes.tvm.harness.target", lambda threads=1: older)
    assert relative(run_graph(graph, x)["y"], wanted) < 2e-6


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 1e-2), ("int8", 3e-2)])
def test_encoder_stays_near(precision: str, bound: float) -> None:
    """Rounding makes of a difference in the last bit now and then one of a level, so only the size of errors agrees."""
    given = feeds(2, 11, 9)
    rounded, plain = Encoder(precision=precision).graph, Encoder().graph
    reference = Interpreter(plain).run(given)["norm2"].numpy()
    ours = relative(run_graph(rounded, given)["norm2"], reference)
    model = relative(Interpreter(rounded).run(given)["norm2"].numpy(), reference)
    assert 1e-5 < ours < bound and 0.8 < ours / model < 1.25


@pytest.mark.parametrize("dim", [32, 20, 7])
def test_attention_in_bfloat16_of_any_dim(dim: int) -> None:
    encoder = Encoder(width=2 * dim)
    core = next(node for node in encoder.graph.model.graph if node.op_type == "Attention")
    core.attributes.add(ir.AttrString("precision", "bf16"))
    given = feeds(2, 43, 39)  # fewer queries have a kernel of their own
    module = compiling.lower(encoder.graph, [{name: array.shape for name, array in given.items()}], target())
    names = {variable.name_hint.rsplit("_", 1)[0] for variable in module.functions.get_global_vars()}
    assert names & ({"flash_bf16", "flash_amx_bf16"} if target().multiplies("bf16") else {"flash"})
    wanted = Interpreter(encoder.graph).run(given)["norm2"].numpy()
    assert relative(run_graph(encoder.graph, given)["norm2"], wanted) < 3e-3


def test_projections_are_packed_where_their_precision_is_equal() -> None:
    module = compiling.lower(Encoder(precision="int8").graph, [{k: v.shape for k, v in feeds().items()}], target())
    layers = [node for node in module.programs[0].nodes if node.key == "rewriter:Linear"]
    assert [node.attributes["precision"] for node in layers] == ["int8"] * 4  # packed, out, up, down
    mixed = Encoder()
    roles = [node for node in mixed.graph.model.graph if node.op_type == "Linear"][:3]
    roles[1].attributes.add(ir.AttrString("precision", "int8"))
    module = compiling.lower(mixed.graph, [{k: v.shape for k, v in feeds().items()}], target())
    layers = [node for node in module.programs[0].nodes if node.key == "rewriter:Linear"]
    assert len(layers) == 5 and sum("precision" in node.attributes for node in layers) == 1


def test_a_computed_weight_is_refused_by_name() -> None:
    x, w = tensor_input("x", np.float32, (4, 8)), tensor_input("w", np.float32, (8, 8))
    node = composite("Linear", [x, w], "y", FLOAT, precision="int8")
    with pytest.raises(UnsupportedOperator, match="int8 with a computed weight"):
        run_graph(graph_of([node], [x, w], {}, 20), {"x": numbers(4, 8), "w": numbers(8, 8)})


def test_one_value_is_rounded_once() -> None:
    x = tensor_input("x", np.float32, (4, 8))
    weights = {name: numbers(8, 8, seed=seed) for seed, name in enumerate(("v", "w"))}
    first, second = (
        composite("Linear", [x, constant(name, array)], f"{name}.y", FLOAT, precision="int8")
        for name, array in weights.items()
    )
    total = ir.Node("", "Add", [first.outputs[0], second.outputs[0]], outputs=[ir.Value(name="y")])
    total.outputs[0].type = ir.TensorType(FLOAT)
    graph = graph_of([first, second, total], [x], weights, 20)
    module = compiling.lower(graph, [{"x": (4, 8)}], target())
    assert str(module.functions["bucket_0"]).count("quantise") == 1
    given = {"x": numbers(4, 8)}
    assert relative(run_graph(graph, given)["y"], Interpreter(graph).run(given)["y"].numpy()) < 1e-6
