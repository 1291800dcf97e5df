"""Attentions as one operator of com.microsoft, and the forms that a site says: the same numbers in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rewriter.core.forms import ATTENTION, DECOMPOSED, GROUP_QUERY, PACKED
from rewriter.graph.composites import composite, is_composite
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.standard import AS_CHOSEN, to_standard
from tests.runtimes.composite_graphs import constant, graph_of, single, tensor_input
from tests.runtimes.test_standard import agree, normal, operators

F32 = np.float32


def causal(tokens: int, padded: bool) -> np.ndarray:
    """(2, 1, S, S) of zeros and minus infinity; padding on the left leaves rows without any key."""
    allowed = np.tril(np.ones((tokens, tokens), bool))[None].repeat(2, 0)
    if padded:
        allowed[0, :, :2] = False
    return np.where(allowed, 0.0, -np.inf).astype(F32)[:, None]


def decoder_attention(**attributes: Any) -> OnnxGraph:
    inputs: dict[str, Any] = {name: (F32, ("B", "S", heads * 8)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    roles = {"query_heads": 4, "key_heads": 2, "value_heads": 2}
    picks = {"query_head_of": [0, 1, 2, 3], "key_head_of": [0, 0, 1, 1], "value_head_of": [0, 0, 1, 1]}
    inputs["bias"] = (F32, ("B", 1, "S", "S"))
    more = {"heads": 4, "scale": 0.3, "bias_kind": "add", "causal": "also", **roles, **picks, **attributes}
    return single("Attention", inputs, {}, 20, **more)


@pytest.mark.parametrize("empty_rows", ["nan", "zero"])
@pytest.mark.parametrize("softcap", [0.0, 0.5])
@pytest.mark.parametrize("padded", [False, True])
def test_grouped_queries(empty_rows: str, softcap: float, padded: bool) -> None:
    graph = decoder_attention(empty_rows=empty_rows, softcap=softcap)
    batches = []
    for tokens in (5, 9):
        feeds = {name: normal(index, 2, tokens, size) for index, (name, size) in enumerate((("q", 32), ("k", 16)))}
        batches.append(feeds | {"v": normal(7, 2, tokens, 16), "bias": causal(tokens, padded)})
    standard = agree(graph, *batches, form=GROUP_QUERY)
    assert "GroupQueryAttention" in operators(standard)


def test_later_keys_that_a_mask_does_not_hide_are_no_matter_for_a_causal_operator() -> None:
    graph = decoder_attention(causal="")
    assert "GroupQueryAttention" not in operators(to_standard(graph, GROUP_QUERY))


def projected(head_of: list[int], precision: str = "fp32", same: bool = True) -> OnnxGraph:
    """Projections of one source (or of two), attention with 4 query heads, a mask, and rows of it without any key."""
    x, other = (tensor_input(name, F32, ("B", "S", 12)) for name in ("x", "other"))
    mask = tensor_input("mask", np.bool_, ("B", 1, 1, "S"))
    heads = {"q": 4, "k": max(head_of) + 1, "v": max(head_of) + 1}
    made, nodes = {}, []
    for index, (role, count) in enumerate(heads.items()):
        dim = 6 if role == "v" else 8
        made[f"{role}.w"], made[f"{role}.b"] = normal(index, 12, count * dim), normal(9 + index, count * dim)
        inputs = [x if same or role == "q" else other]
        inputs += [constant(name, made[name]) for name in (f"{role}.w", f"{role}.b")[: 1 if role == "k" else 2]]
        nodes.append(composite("Linear", inputs, role, **({} if precision == "fp32" else {"precision": precision})))
    roles = {f"{role}_heads": count for role, count in zip(("query", "key", "value"), heads.values(), strict=True)}
    picks = {"query_head_of": [0, 1, 2, 3], "key_head_of": head_of, "value_head_of": head_of}
    operands = [*(node.outputs[0] for node in nodes), mask]
    more = {"heads": 4, "scale": 0.3, "bias_kind": "bool", "empty_rows": "zero", **roles, **picks}
    nodes.append(composite("Attention", operands, "y", **more))
    return graph_of(nodes, [x, mask] if same else [x, other, mask], made, 20)


@pytest.mark.parametrize("head_of", [[0, 1, 2, 3], [0, 0, 1, 1], [1, 0, 1, 0]])
def test_projections_inside(head_of: list[int]) -> None:
    graph = projected(head_of)
    batches = []
    for tokens in (5, 8):
        mask = np.ones((3, 1, 1, tokens), bool)
        mask[0, ..., 3:], mask[1] = False, False
        batches.append({"x": normal(4, 3, tokens, 12), "mask": mask})
    standard = agree(graph, *batches, form=PACKED)
    assert operators(standard).count("Attention") == 1 and "MatMul" not in operators(standard)
    assert len(standard.model.graph.initializers) < len(graph.model.graph.initializers) + 8


@pytest.mark.parametrize("graph", [projected([0, 1, 2, 3], "int8"), projected([0, 1, 2, 3], same=False)])
def test_projections_that_cannot_be_packed(graph: OnnxGraph) -> None:
    assert "Attention" not in operators(to_standard(graph, PACKED))


def choose(graph: OnnxGraph, *forms: str) -> OnnxGraph:
    for node in graph.model.graph:
        if is_composite(node, "Attention"):
            node.attributes["forms"] = ir.AttrStrings("forms", forms)
    return graph


def test_each_site_is_written_in_its_own_form() -> None:
    graph = choose(projected([0, 1, 2, 3]), "flash", "multi_head_attention")
    standard = to_standard(graph, AS_CHOSEN)
    assert "MultiHeadAttention" in operators(standard) and standard.opset == 20
    assert standard.model.graph.opset_imports["com.microsoft"] == 1
    assert "Softmax" in operators(to_standard(graph))


def test_a_chosen_operator_of_a_later_opset_takes_the_graph_there() -> None:
    graph = choose(projected([0, 0, 1, 1]), ATTENTION)
    standard = to_standard(graph, AS_CHOSEN)
    assert (graph.opset, standard.opset) == (20, 23) and "Attention" in operators(standard)
    assert standard.inputs == graph.inputs
    assert [(one.name, one.dtype) for one in standard.outputs] == [(one.name, one.dtype) for one in graph.outputs]
    feeds = {"x": normal(4, 2, 5, 12), "mask": np.ones((2, 1, 1, 5), bool)}
    wanted, found = (Interpreter(one, torch.float64).run(feeds)["y"] for one in (graph, standard))
    torch.testing.assert_close(found, wanted)
    assert to_standard(graph, DECOMPOSED).opset == 20
