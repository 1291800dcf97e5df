"""The copy for analysis: fewer nodes, the same names, the same values."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from rewriter.graph.canonical import canonical
from rewriter.graph.checks import check_legal
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from tests.graph.harness import graph_of, numbers

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3] x, bool p) => (float[N, 3] y, float[N, 3] z, float[N, 3] r)
  <float[3] w = {1, 2, 3}, float[3] idle = {0, 0, 0}> {
  c = Constant<value_floats = [1.0, 2.0, 4.0]>()
  shared = Identity(w)
  a = Identity(x)
  b = Cast<to = 1>(a)
  d = Dropout(b)
  t = Mul(d, shared)
  s = Add(t, c)
  unused = Exp(s)
  y = Identity(s)
  z = Relu(s)
  r = If(p) <then_branch = th () => (float[N, 3] p1) { q1 = Identity(a)  p1 = Abs(q1) },
             else_branch = el () => (float[N, 3] p2) { p2 = Identity(c2)  c2 = Sub(a, w) }>
}"""


def graph() -> OnnxGraph:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node[-1].attribute[1].g.node.sort(key=lambda node: node.op_type != "Sub")
    return graph_of(proto)


def test_only_computing_nodes_are_left() -> None:
    copy = canonical(graph())
    assert [node.op_type for node in copy.topological()] == ["Mul", "Add", "Identity", "Relu", "If"]
    assert set(copy.constants) == {"w", "c"}
    mul = copy.topological()[0]
    assert [value.name for value in mul.inputs if value is not None] == ["x", "w"]
    check_legal(copy)


def test_names_and_values_stay() -> None:
    original, copy = graph(), canonical(graph())
    assert {value.name for value in copy.values()} <= {value.name for value in original.values()}
    for flag in (True, False):
        feeds = {"x": numbers(2, 3), "p": np.array(flag)}
        before, after = Interpreter(original).run(feeds), Interpreter(copy).run(feeds)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_original_is_untouched() -> None:
    original = graph()
    before = original.fingerprint()
    canonical(original)
    assert original.fingerprint() == before


def test_live_dropout_and_real_casts_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x) => (float16[3] y) <float ratio = {0.5}, bool training = {1}> {
      a = Dropout(x, ratio, training)
      y = Cast<to = 10>(a)
    }"""
    copy = canonical(graph_of(onnx.parser.parse_model(text)))
    assert [node.op_type for node in copy.topological()] == ["Dropout", "Cast"]
