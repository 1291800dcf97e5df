"""Every form of the standard's Attention: states, and numbers of the onnx reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.site import State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from tests.attention.test_fused import DIM, HEADS, WIDTH, Made
from tests.attention.test_fused_forms import random

GROUPS, BATCH, TOKENS, PAST = 2, 2, 5, 3
BOOL, FLOAT, INT64 = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64
FORMS = ["plain", "causal", "boolean", "added", "short mask", "per head", "lengths", "lengths and causal", "capped"]


def attention(made: Made, form: str, past: bool, four: bool, feeds: dict[str, np.ndarray]) -> str:
    operands = [made.linear(columns=n * DIM) for n in (HEADS, GROUPS, GROUPS)]
    attributes: dict[str, Any] = {"q_num_heads": HEADS, "kv_num_heads": GROUPS}
    if four:
        for i, heads in enumerate((HEADS, GROUPS, GROUPS)):
            split = made.op("Reshape", operands[i], made.constant(np.array([0, 0, heads, DIM])))
            operands[i] = made.op("Transpose", split, perm=(0, 2, 1, 3))
        attributes = {}
    keys, total = ("total", TOKENS + PAST) if past else ("seq", TOKENS)
    extra, outputs = ["", "", "", ""], ("c",)
    if form == "boolean":
        extra[0] = made.input("mask", BOOL, "batch", 1, "seq", keys)
        feeds["mask"] = random(BATCH, 1, TOKENS, total) > -0.7
    if form in ("added", "capped"):
        extra[0] = made.input("mask", FLOAT, "seq", keys)
        feeds["mask"] = random(TOKENS, total)
    if form == "per head":
        extra[0] = made.input("mask", FLOAT, HEADS, "seq", keys)
        feeds["mask"] = random(HEADS, TOKENS, total)
    if form == "short mask":
        extra[0] = made.input("mask", FLOAT, "batch", 1, 1, "shorter")
        feeds["mask"] = random(BATCH, 1, 1, 4)
    if past:
        extra[1:3] = [made.input(f"past_{n}", FLOAT, "batch", GROUPS, "past_seq", DIM) for n in "kv"]
        outputs = ("c", *(made.output(f"present_{n}", "batch", GROUPS, "total", DIM) for n in "kv"))
        feeds |= {f"past_{n}": random(BATCH, GROUPS, PAST, DIM, seed=i) for i, n in enumerate("kv")}
    if form.startswith("lengths"):
        extra[3] = made.input("lengths", INT64, "batch")
        feeds["lengths"] = np.array([total - 2, total])
    attributes |= {"is_causal": int("causal" in form), "scale": 0.3} | ({"softcap": 2.0} if form == "capped" else {})
    context = made.op("Attention", *operands, *extra, outputs=outputs, **attributes)
    if not four:
        return context
    return made.op("Reshape", made.op("Transpose", context, perm=(0, 2, 1, 3)), made.constant(np.array([0, 0, WIDTH])))


def outputs_of(graph: OnnxGraph, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in Interpreter(graph).run({s.name: feeds[s.name] for s in graph.inputs}).values()]


@pytest.mark.parametrize("four", [False, True])
# the standard forbids lengths of an outer cache beside a cache of the operator's own
@pytest.mark.parametrize(
    ("form", "past"), [(form, past) for form in FORMS for past in (False, True) if not (past and "lengths" in form)]
)
def test_every_form_is_lowerable(form: str, past: bool, four: bool, tmp_path: Path) -> None:
    made, feeds = Made(), {"x": random(BATCH, TOKENS, WIDTH)}
    graph = made.graph(tmp_path, attention(made, form, past, four, feeds), opset=24)
    (site,) = recognise(graph).attention
    assert site.state is State.LOWERABLE, site.problems
    assert (site.heads, site.kv_heads, site.key.head_of, site.cached) == (HEADS, GROUPS, (0, 0, 1, 1), past)
    assert (site.softcap, site.scale) == (2.0 if form == "capped" else 0.0, pytest.approx(0.3))
    expected = outputs_of(graph, feeds)
    reference = ReferenceEvaluator(onnx.load(tmp_path / "model.onnx"))
    for one, other in zip(expected, reference.run(None, feeds), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    lowered = lower(graph, [site])
    assert not any(node.op_type == "Attention" and not node.domain for node in lowered.model.graph)
    for one, other in zip(outputs_of(lowered, feeds), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_that_leave_the_operator_forbid_rewriting(mode: int, tmp_path: Path) -> None:
    made = Made()
    scores = made.output("scores", "batch", HEADS, "seq", "seq")
    context = made.op(
        "Attention", made.linear(), made.linear(), made.linear(), outputs=("c", "", "", scores), q_num_heads=HEADS,
        kv_num_heads=HEADS, qk_matmul_output_mode=mode,
    )  # fmt: skip
    (site,) = recognise(made.graph(tmp_path, context, opset=23)).attention
    assert (site.state, [problem.code for problem in site.problems]) == (State.MAPPED, ["exposed-probabilities"])
