"""Attention inside If, Loop and Scan: found and mapped, with names that say where, and never rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rewriter.attention.recognise import recognise
from rewriter.core.site import Recognition, State
from rewriter.graph.onnx import load

HEADS, DIM, WIDTH = 4, 6, 24
BOOL, FLOAT, INT64 = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64


class Part:
    """Nodes and weights of one graph; `out` names the attention result."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.random = name, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def constant(self, array: np.ndarray) -> str:
        name = f"{self.name}_w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{self.name}_v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def matrix(self, rows: int, columns: int) -> str:
        return self.constant(self.random.standard_normal((rows, columns)).astype(np.float32) * rows**-0.5)

    def attention(self, x: str, weights: tuple[str, ...] = (), past: str = "") -> str:
        """Multi-head self-attention of x, its values after a past if there is one."""
        shape, turned = self.constant(np.array([0, 0, HEADS, DIM])), (0, 2, 1, 3)
        names = weights or tuple(self.matrix(WIDTH, WIDTH) for _ in range(4))
        q, k, v = (
            self.op("Transpose", self.op("Reshape", self.op("MatMul", x, w), shape), perm=turned) for w in names[:3]
        )
        if past:
            k, v = (self.op("Concat", past, part, axis=2) for part in (k, v))
        keys = self.op("Transpose", k, perm=(0, 1, 3, 2))
        scores = self.op("Mul", self.op("MatMul", q, keys), self.constant(np.array(DIM**-0.5, np.float32)))
        context = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=turned)
        merged = self.op("Reshape", context, self.constant(np.array([0, 0, WIDTH])))
        return self.op("MatMul", merged, names[3])

    def body(self, outputs: list[str], inputs: tuple[onnx.ValueInfoProto, ...] = ()) -> onnx.GraphProto:
        infos = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
        return helper.make_graph(self.nodes, self.name, list(inputs), infos, self.weights)


def info(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def found_in(part: Part, result: str, inputs: list[onnx.ValueInfoProto], folder: Path) -> Recognition:
    outputs = [helper.make_tensor_value_info(result, FLOAT, None)]
    graph = helper.make_graph(part.nodes, part.name, inputs, outputs, part.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return recognise(load(path))


X = info("x", FLOAT, "batch", "seq", WIDTH)


def test_a_merged_decoder_is_mapped_in_both_branches(tmp_path: Path) -> None:
    main = Part("main", 0)
    shared = tuple(main.matrix(WIDTH, WIDTH) for _ in range(4))
    branches = {}
    for name, past in (("then_branch", "past"), ("else_branch", "")):
        part = Part(name[:4], 1)
        branches[name] = part.body([part.attention("hidden", shared, past)])
    main.op("Relu", "x", output="hidden")
    chosen = main.op("If", "use_cache", **branches)
    outer = main.attention(chosen)
    inputs = [X, info("use_cache", BOOL), info("past", FLOAT, "batch", HEADS, "past_seq", DIM)]
    found = found_in(main, outer, inputs, tmp_path)
    inside = [site for site in found.attention if "branch" in site.id]
    assert {site.id for site in inside} == {f"n1/{name}/layers.0.attention" for name in branches}
    for site in inside:
        assert site.state is State.MAPPED
        assert "control-flow" in [problem.code for problem in site.problems]
        assert site.query.weight_name == shared[0]
        assert all(node.startswith("n1/") for node in site.nodes)
        weight = numpy_helper.to_array(main.weights[0]).reshape(WIDTH, HEADS, DIM)
        np.testing.assert_allclose(site.query.weight_CGD, weight)
    assert {site.cached for site in inside} == {True, False}
    outside = [site for site in found.attention if site not in inside]
    assert [(site.id, site.state) for site in outside] == [("layers.0.attention", State.LOWERABLE)]
    assert not found.unrecognised


def test_a_loop_and_a_branch_inside_it(tmp_path: Path) -> None:
    main, body, branch = Part("main", 0), Part("body", 1), Part("branch", 2)
    other = Part("other", 3)
    branches = {"then_branch": branch.body([branch.attention("state")])}
    branches["else_branch"] = other.body([other.op("Relu", "state")])
    mixed = body.op("Add", body.attention("state"), "state")
    body.op("If", "going", output="picked", **branches)
    after = body.op("Add", mixed, "picked")
    again = body.op("Identity", "going", output="again")
    given = (info("turn", INT64), info("going", BOOL), info("state", FLOAT, "batch", "seq", WIDTH))
    graph = body.body([again, after], given)
    graph.output[0].type.tensor_type.elem_type = BOOL
    trips, start = main.constant(np.array(3, np.int64)), main.constant(np.array(True))
    result = main.op("Loop", trips, start, "x", body=graph)
    found = found_in(main, result, [X], tmp_path)
    assert [site.id for site in found.attention] == [
        "n0/body/layers.0.attention",
        f"n0/body/n{[n.op_type for n in body.nodes].index('If')}/then_branch/layers.0.attention",
    ]
    assert all(site.state is State.MAPPED and site.mapped for site in found.attention)
    assert not found.unrecognised


def test_the_body_of_a_scan(tmp_path: Path) -> None:
    main, body = Part("main", 0), Part("body", 1)
    after = body.op("Add", body.attention("state"), "slice")
    given = (info("state", FLOAT, "batch", "seq", WIDTH), info("slice", FLOAT, WIDTH))
    copied = body.op("Identity", after)
    node = helper.make_node("Scan", ["x", "steps"], ["last", "all"], num_scan_inputs=1, name="scan",
                            body=body.body([after, copied], given))  # fmt: skip
    main.nodes.append(node)
    found = found_in(main, "last", [X, info("steps", FLOAT, 3, WIDTH)], tmp_path)
    (site,) = found.attention
    assert (site.id, site.state, site.heads) == ("scan/body/layers.0.attention", State.MAPPED, HEADS)


def test_what_cannot_be_understood_inside_is_named(tmp_path: Path) -> None:
    main, then, other = Part("main", 0), Part("then", 1), Part("other", 2)
    broken = then.op("Softmax", then.op("MatMul", "x", then.matrix(7, 7)), axis=-1)
    branches = {"then_branch": then.body([broken]), "else_branch": other.body([other.op("Relu", "x")])}
    result = main.op("If", "flag", **branches)
    found = found_in(main, result, [X, info("flag", BOOL)], tmp_path)
    assert not found.attention
    assert [entry.node.split("/")[:2] for entry in found.unrecognised if "branch" in entry.node] == [
        ["n0", "then_branch"]
    ]
