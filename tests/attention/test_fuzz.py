"""Broken and odd graphs: never a crash, never a wrong rewrite; one clear error, or a refusal, or the truth."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.fixtures import read_pack
from rewriter.attention.identity import difference
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.errors import UserError
from rewriter.core.site import State
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load

SEEDS = ("packed_unbind.eager.l17", "packed_qk_norm.sdpa.l17", "packed_chunk.sdpa.l17", "torch_mha.eager.l17")
FIXTURES = Path(__file__).parent.parent / "fixtures"
KINDS = ("drop", "rewire", "operator", "attribute", "weight", "swap", "opset", "rename", "dims")
KINDS += ("input", "domain", "repeat", "order", "dtype", "external", "output")
OPERATORS = ("Add", "MatMul", "Softmax", "Transpose", "Reshape", "Identity", "Nonsense")
ODD_DIMS = ([], [0], [1], [2, 0], [3, 5, 7], [2**31, 2**31], [-1])


@cache
def seeds() -> dict[str, onnx.ModelProto]:
    return {name: model for name, model in read_pack(FIXTURES / "l17.tar.xz").models.items() if name in SEEDS}


def mutate(model: onnx.ModelProto, draw: st.DrawFn) -> None:
    """One random change of the kind that careless tools make."""
    graph = model.graph
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    names = sorted({name for other in graph.node for name in (*other.input, *other.output)})
    kind = draw(st.sampled_from(KINDS))
    if kind == "drop":
        graph.node.remove(node)
    elif kind == "rewire" and node.input:
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
    elif kind == "operator":
        node.op_type = draw(st.sampled_from(OPERATORS))
    elif kind == "attribute" and node.attribute:
        node.attribute[0].i = draw(st.integers(-3, 2**40))
        node.attribute[0].ints.append(draw(st.integers(-5, 9)))
    elif kind == "weight" and graph.initializer:
        tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))]
        array = np.zeros(tuple(tensor.dims)) if draw(st.booleans()) else np.full(tuple(tensor.dims), np.nan)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    elif kind == "swap":
        other = draw(st.integers(0, len(graph.node) - 1))
        node.input[:], graph.node[other].input[:] = list(graph.node[other].input), list(node.input)
    elif kind == "opset":
        model.opset_import[0].version = draw(st.sampled_from((1, 9, 11, 13, 17, 24, 99)))
    elif kind == "rename" and node.output:
        node.output[0] = draw(st.sampled_from(names))
    elif kind == "dims" and graph.initializer:
        tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))]
        del tensor.dims[:]
        tensor.dims.extend(draw(st.sampled_from(ODD_DIMS)))
    else:
        mutate_more(model, node, kind, draw)


def mutate_more(model: onnx.ModelProto, node: onnx.NodeProto, kind: str, draw: st.DrawFn) -> None:
    """Changes of places, dtypes and declarations."""
    graph = model.graph
    tensor = draw(st.sampled_from(graph.initializer)) if graph.initializer else None
    if kind == "input":
        sizes = draw(st.sampled_from(graph.input)).type.tensor_type.shape.dim
        for size in sizes[:1]:
            size.dim_value = draw(st.sampled_from((0, 1, 7, -1, 2**28, 2**40)))
    elif kind == "domain":
        node.domain = draw(st.sampled_from(("com.microsoft", "elsewhere", "ai.onnx", "rewriter")))
    elif kind == "repeat":
        graph.node.add().CopyFrom(node)
        for place in range(len(node.output)):
            graph.node[-1].output[place] += "/again"
    elif kind == "order":
        graph.node.insert(0, onnx.NodeProto())
        graph.node[0].CopyFrom(node)
        graph.node.remove(node)
    elif kind == "dtype" and tensor is not None:
        tensor.data_type = draw(st.sampled_from((0, 7, 8, 10, 11, 16, 22, 99)))
    elif kind == "external" and tensor is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = draw(st.sampled_from(("missing", "../outside", "/etc/hostname", "model.onnx", "")))
        tensor.external_data.add(key="location", value=place)
    elif kind == "output":
        graph.output[0].name = draw(st.sampled_from(sorted({name for other in graph.node for name in other.output})))


@st.composite
def mutants(draw: st.DrawFn) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(seeds()[draw(st.sampled_from(SEEDS))])
    for _ in range(draw(st.integers(1, 3))):
        mutate(model, draw)
    return model


def outputs(graph: OnnxGraph) -> list[torch.Tensor]:
    random = np.random.default_rng(5)
    sizes = {"batch": 3, "seq": 8, "kseq": 7}
    feeds = {
        spec.name: random.standard_normal([s if isinstance(s, int) else sizes.get(s or "", 4) for s in spec.shape])
        for spec in graph.inputs
    }
    return list(
        Interpreter(graph, dtype=torch.float64).run({n: a.astype(np.float32) for n, a in feeds.items()}).values()
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutants())
def test_mutants_give_an_error_a_refusal_or_the_identity(model: onnx.ModelProto) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            graph = load(path)
            found = recognise(graph)
        except UserError as problem:
            assert str(problem)
            return
        sites = [site for site in found.sites if site.state is State.LOWERABLE]
        if not sites:
            return
        lowered = lower(graph, sites)
        try:
            expected = outputs(graph)
        except UserError:
            return
        for before, after in zip(expected, outputs(lowered), strict=True):
            assert difference(after, before) < 1e-5
