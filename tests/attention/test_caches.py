"""Where caches enter and leave graphs, which of them may change, and graphs in which they did."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.low_rank_cache import LowRankCache
from rewriter.attention.caches import cache_ports, cached_width
from rewriter.attention.lower import fragment, lower
from rewriter.attention.recognise import recognise
from rewriter.benchmark.cached_decoder import Shape, cached_decoder
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, State
from rewriter.core.target import Target
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.reading import from_checked_proto
from rewriter.runtimes.standard import to_standard
from rewriter.search.caches import cache_maps, converted, fitted_shapes
from rewriter.search.structure import blank_statistics
from tests.passes.reference import TARGET

PASS = LowRankCache(allowed=True)
LLAMA, GPT2 = Shape(layers=1), Shape("gpt2", layers=1, kv_heads=4)


def graph_of(proto: onnx.ModelProto) -> OnnxGraph:
    return OnnxGraph(from_checked_proto(proto, Path("decoder.onnx")))


@cache
def decoder(shape: Shape, past: bool) -> tuple[OnnxGraph, AttentionSite]:
    graph = graph_of(cached_decoder(shape, past))
    return graph, recognise(graph).attention[0]


def feeds(shape: Shape, past: int, tokens: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(past)
    made: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, shape.vocabulary, (2, tokens)),
        "attention_mask": np.ones((2, past + tokens), np.int64),
    }
    for part in ("key", "value"):
        made[f"past_key_values.0.{part}"] = rng.standard_normal((2, shape.kv_heads, past, shape.dim)).astype(np.float32)
    return made


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_ports_of_both_graphs(shape: Shape) -> None:
    (prefill, first), (with_past, second) = (decoder(shape, past) for past in (False, True))
    assert first.state is second.state is State.LOWERABLE
    assert [(p.role, p.input, p.output) for p in cache_ports(prefill, first)] == [
        ("key", "", "present.0.key"),
        ("value", "", "present.0.value"),
    ]
    assert [p.input for p in cache_ports(with_past, second)] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert cached_width([second]) == 2 * shape.kv_heads * shape.dim
    assert PASS.refuse(second) is None


@pytest.mark.parametrize(
    "form", [{"heads": 1}, {"key": 8, "value": 8}, {"key_latent": 12, "value_latent": 20}, {"value": 8}]
)
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_graph_with_smaller_caches(shape: Shape, form: dict[str, int]) -> None:
    """Names stay, sizes change on both sides, and old caches go in through their map as they do in a fragment."""
    graph, site = decoder(shape, True)
    after = PASS.apply(site, Option.of(PASS.name, site.id, **form), blank_statistics(site))
    assert isinstance(after, AttentionSite)
    lowered = lower(graph, [after])
    assert [spec.name for spec in lowered.inputs] == [spec.name for spec in graph.inputs]
    assert [spec.name for spec in lowered.outputs] == [spec.name for spec in graph.outputs]
    sizes = {spec.name: spec.shape for spec in (*lowered.inputs, *lowered.outputs)}
    for operand, part in ((after.key, "key"), (after.value, "value")):
        assert sizes[f"past_key_values.0.{part}"] == ("batch", operand.heads, "past", operand.dim)
        assert sizes[f"present.0.{part}"] == ("batch", operand.heads, "total", operand.dim)
    given = feeds(shape, past=5)
    new = converted(given, cache_maps(lowered, [after]))
    found = Interpreter(to_standard(lowered)).run(new)
    env = {**Interpreter(graph).run(given, taps="all")}
    part = fragment(graph, after)
    values = {**env, **{name: Interpreter(graph).tensor(array) for name, array in part.constants.items()}}
    Interpreter(graph).run_nodes(part.nodes, values, set(values) | {site.output.value} if site.output else set())
    assert site.output is not None
    inner = Interpreter(lowered).run(new, taps=[site.output.value])[site.output.value]
    np.testing.assert_allclose(inner, values[site.output.value], atol=2e-5)
    assert found["logits"].shape == env["logits"].shape
    shapes = fitted_shapes({name: array.shape for name, array in given.items()}, lowered.inputs)
    assert shapes == {name: array.shape for name, array in new.items()}


def changed(edit: str) -> onnx.ModelProto:
    """A decoder with a cache that is more than its attention knows."""
    proto = cached_decoder(LLAMA, True)
    nodes, name = proto.graph.node, "past_key_values.0.key"
    join = next(node for node in nodes if node.op_type == "Concat" and name in node.input)
    if edit == "quantised":
        entry = next(value for value in proto.graph.input if value.name == name)
        entry.type.tensor_type.elem_type = TensorProto.INT8
        proto.graph.initializer.append(numpy_helper.from_array(np.array(0.05, np.float32), "step"))
        nodes.insert(0, helper.make_node("DequantizeLinear", [name, "step"], ["restored"]))
        join.input[0] = "restored"
    elif edit == "sliding":
        for title, numbers in (("start", [-4]), ("end", [1 << 40]), ("axis", [2])):
            proto.graph.initializer.append(numpy_helper.from_array(np.array(numbers), title))
        join.output[0] = "joined"
        for node in nodes:
            node.input[:] = ["joined" if one == "present.0.key" else one for one in node.input]
        nodes.append(helper.make_node("Slice", ["joined", "start", "end", "axis"], ["present.0.key"]))
    elif edit == "read":
        nodes.append(helper.make_node("ReduceMax", [name], ["largest"], keepdims=0))
        proto.graph.output.append(helper.make_tensor_value_info("largest", TensorProto.FLOAT, []))
    else:
        nodes.append(helper.make_node("Shape", [name], ["sizes"]))
        proto.graph.output.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]))
    return proto


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        ("quantised", "cache-computed"),
        ("sliding", "cache-computed"),
        ("read", "cache-read-elsewhere"),
        ("sizes", "cache-read-elsewhere"),
    ],
)
def test_caches_that_are_more_than_their_attention_knows_keep_their_sizes(edit: str, code: str) -> None:
    graph = graph_of(changed(edit))
    site = recognise(graph).attention[0]
    refusal = PASS.refuse(site)
    if edit == "quantised" and refusal is not None and refusal.code == "quantised":
        return  # the whole graph is looked at in floats and left alone
    assert refusal is not None and refusal.code == code and PASS.options(site, TARGET) == ()


def test_what_is_refused_would_be_wrong() -> None:
    """A reader of the content, or of the sizes, gets something else once the cache has other sizes."""
    for edit, name in (("read", "largest"), ("sizes", "sizes")):
        graph = graph_of(changed(edit))
        site = recognise(graph).attention[0]
        bare = AttentionSite(**{**vars(site), "problems": ()})
        after = PASS.apply(bare, Option.of(PASS.name, site.id, heads=1), blank_statistics(site))
        lowered = lower(graph, [after])
        given = feeds(LLAMA, past=5)
        before = Interpreter(graph).run(given)[name]
        found = Interpreter(lowered).run(converted(given, cache_maps(lowered, [after])))[name]
        assert not np.allclose(before, found)


def test_without_leave_nothing_is_offered() -> None:
    _, site = decoder(LLAMA, True)
    strict = discover()[PASS.name]
    assert strict.refuse(site) is not None and strict.options(site, Target(**vars(TARGET))) == ()
