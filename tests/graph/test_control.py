"""If, Loop and Scan, with values taken from outside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.harness import by_reference, numbers, ours

IF = """<ir_version: 8, opset_import: ["" : 17]>
g (float[3] x, bool c) => (float[3] y) <float[3] w = {1, 2, 3}> {
  a = Neg(x)
  y = If(c) <then_branch = t () => (float[3] p) { p = Add(a, w) },
             else_branch = e () => (float[3] q) <float[3] w2 = {4, 5, 6}> { r = Mul(a, w2)  q = Identity(r) }>
}"""
LOOP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[3] x, int64 n) => (float[3] y, float[K, 3] s) <bool go = {1}> {
  k = Neg(x)
  y, s = Loop(n, go, x) <body = b (int64 i, bool c, float[3] h) => (bool d, float[3] o, float[3] e) {
     d = Identity(c)  o = Add(h, k)  f = Cast<to = 1>(i)  e = Mul(o, f) }>
}"""
SCAN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x, float[4, 2] xs) => (float[2] y, float[4, 2] ys) {
  y, ys = Scan <num_scan_inputs = 1, body = b (float[2] h, float[2] e) => (float[2] o, float[2] z) {
     o = Add(h, e)  z = Neg(o) }> (x, xs)
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_if_runs_one_branch_on_outer_values(condition: bool) -> None:
    proto = onnx.parser.parse_model(IF)
    feeds = {"x": numbers(3), "c": np.array(condition)}
    np.testing.assert_allclose(ours(proto, feeds)[0], by_reference(proto, feeds)[0])


@pytest.mark.parametrize("trips", [1, 3])
def test_loop_carries_and_stacks(trips: int) -> None:
    proto = onnx.parser.parse_model(LOOP)
    feeds = {"x": numbers(3), "n": np.array(trips)}
    for mine, other in zip(ours(proto, feeds), by_reference(proto, feeds), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_loop_of_no_trips_gives_its_start_and_nothing() -> None:
    found = ours(onnx.parser.parse_model(LOOP), {"x": numbers(3), "n": np.array(0)})
    np.testing.assert_array_equal(found[0], numbers(3))
    assert found[1].shape == (0, 3)


def test_scan_carries_and_stacks() -> None:
    proto = onnx.parser.parse_model(SCAN)
    feeds = {"x": numbers(2), "xs": numbers(4, 2, seed=1)}
    for mine, other in zip(ours(proto, feeds), by_reference(proto, feeds), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)
