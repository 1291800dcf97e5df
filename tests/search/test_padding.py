"""Padding is harmless only where it was shown to be, along the axes that requests vary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.calibration.data import load_data
from rewriter.core.errors import DataError, OptionError
from rewriter.core.lengths import Requests
from rewriter.core.options import Options
from rewriter.graph.onnx import OnnxGraph, TensorSpec, load
from rewriter.search.padding import Axes, axes_of, harm_of_padding, name_outputs, outputs_of, padded, shapes_at
from rewriter.search.requests import RequestMaker, known_requests
from rewriter.search.traffic import choose_traffic
from tests.runtimes.composite_graphs import constant, graph_of, tensor_input

INT, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
AXES = Axes("tokens", "batch")


def pooled(operator: str) -> OnnxGraph:
    """Sums, means, or keeps x along tokens."""
    x = tensor_input("x", np.float32, ("batch", "tokens", 3))
    out = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    axes = constant("axes", np.array([1]))
    if operator == "Relu":
        nodes, used, shape = [ir.Node("", "Relu", [x], outputs=[out])], {}, ["batch", "tokens", 3]
    else:
        attributes = [ir.AttrInt64("keepdims", 0)]
        nodes = [ir.Node("", operator, [x, axes], attributes, outputs=[out])]
        used, shape = {"axes": np.array([1])}, ["batch", 3]
    out.shape = ir.Shape(shape)
    return graph_of(nodes, [x], used, 18)


@pytest.mark.parametrize(("operator", "harmless"), [("ReduceSum", True), ("ReduceMean", False), ("Relu", True)])
def test_what_padding_changes_is_found(operator: str, harmless: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    graph = pooled(operator)
    outputs = outputs_of(graph, AXES, *[(size, {"x": np.ones((*size, 3), np.float32)}) for size in ((1, 4), (2, 6))])
    assert outputs == {"y": ("batch", "tokens", 3) if operator == "Relu" else ("batch", 3)}
    harm = harm_of_padding(graph, AXES, outputs, [{"x": x}], (3, 8))
    assert (harm == "") is harmless, harm
    if not harmless:
        assert "output y changes by" in harm


def test_axes_of_outputs_are_found_by_their_sizes_and_named() -> None:
    graph = pooled("Relu")
    next(iter(graph.model.graph.outputs)).shape = ir.Shape(["batch", "other", 3])
    runs = [(size, {"x": np.ones((*size, 3), np.float32)}) for size in ((1, 2), (2, 5))]
    found = outputs_of(graph, AXES, *runs)
    name_outputs(graph, found)
    assert graph.outputs[0].shape == ("batch", "tokens", 3)
    # An axis that follows neither is nobody's to cut back.
    assert "changes its shape" in harm_of_padding(graph, AXES, {"y": ("batch", None, 3)}, [runs[0][1]], (1, 4))


def test_axes() -> None:
    ids = TensorSpec("ids", INT, ("batch", "tokens"))
    mask = TensorSpec("mask", INT, ("batch", "tokens"))
    image = TensorSpec("image", FLOAT, ("batch", 3, 224, 224))
    memory = TensorSpec("memory", FLOAT, ("batch", "source", 8))
    assert axes_of([ids, mask]) == AXES
    assert axes_of([memory, ids]) == AXES
    assert axes_of([TensorSpec("ids", INT, (1, "tokens"))]) == Axes("tokens", None)
    assert axes_of([image]) is None
    assert shapes_at([ids, memory], {"ids": (1, 9), "memory": (1, 7, 8)}, AXES, (2, 5)) == {
        "ids": (2, 5), "memory": (2, 7, 8),
    }  # fmt: skip


def test_filling_is_with_zeros_behind() -> None:
    got = padded({"x": np.ones((1, 2), np.int64)}, {"x": (2, 3)})["x"]
    np.testing.assert_array_equal(got, [[1, 1, 0], [0, 0, 0]])


def test_traffic_of_the_data_is_cut_to_its_true_lengths(
    encoder: Path, encoder_data: Path, encoder_arrays: dict[str, np.ndarray]
) -> None:
    graph = load(encoder)
    data = load_data(encoder_data, graph.inputs)
    workload, traffic = choose_traffic(graph, data, Options())
    assert traffic is not None and traffic.harm == "" and not traffic.asked
    lengths = encoder_arrays["attention_mask"].sum(1)
    assert traffic.requests.total == len(lengths) and traffic.requests.longest == workload.shapes["input_ids"][1] == 16
    made = traffic.make(1, 9, 0)
    assert made["input_ids"].shape == (1, 9) and made["attention_mask"].all() and (made["input_ids"] != 0).all()
    assert traffic.make(1, 9, 0)["input_ids"].tolist() == made["input_ids"].tolist()
    # Longer than any sample: drawn.
    assert traffic.make(2, 40, 0)["input_ids"].shape == (2, 40)


def test_a_histogram_stands_in_for_shapes(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps({"requests": {"2x9": 3, "1x30": 1}}))
    workload, traffic = choose_traffic(load(encoder), None, Options(shape_histogram=tmp_path / "h.json"))
    assert workload.shapes == {"input_ids": (2, 30), "attention_mask": (2, 30)}
    assert traffic is not None and traffic.asked and traffic.harm == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [("[5, 500]", "requests of 500 tokens, which the model cannot run"), ('{"lengths": "many"}', "neither")],
)
def test_a_histogram_that_does_not_fit(encoder: Path, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises((OptionError, DataError), match=said):
        choose_traffic(load(encoder), None, Options(shape_histogram=tmp_path / "h.json"))


def test_a_histogram_for_a_model_without_such_axes(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text("[5]")
    x = tensor_input("x", np.float32, (1, 4))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4]))
    fixed = graph_of([ir.Node("", "Relu", [x], outputs=[y])], [x], {}, 18)
    with pytest.raises(OptionError, match="no input of the model has a named second axis"):
        choose_traffic(fixed, None, Options(shape_histogram=tmp_path / "h.json"))
    x = tensor_input("x", np.float32, (1, "tokens"))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens"]))
    single = graph_of([ir.Node("", "Relu", [x], outputs=[y])], [x], {}, 18)
    (tmp_path / "h.json").write_text('{"requests": {"8x5": 1}}')
    with pytest.raises(OptionError, match="requests of batch 8, the model takes batch 1"):
        choose_traffic(single, None, Options(shape_histogram=tmp_path / "h.json"))


def test_nothing_says_what_lengths_will_come(encoder: Path) -> None:
    assert known_requests(None, None) is None
    shapes = {"input_ids": (1, 8)}
    assert choose_traffic(load(encoder), None, Options(shapes=shapes))[1] is None


def test_padding_that_would_change_answers_is_said(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text("[3, 5, 9]")
    _, traffic = choose_traffic(pooled("ReduceMean"), None, Options(shape_histogram=tmp_path / "h.json"))
    assert traffic is not None and "output y changes by" in traffic.harm
    made = RequestMaker(pooled("Relu"), {"x": (1, 9, 3)}, AXES, None, 0)(2, 4, 1)
    assert made["x"].shape == (2, 4, 3) and Requests.of_lengths([1], "x").total == 1
