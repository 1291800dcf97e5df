"""One plan for the graphs of a decoder: caches go from one to the other as if there had been one run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rewriter.assembly.assemble import assemble
from rewriter.assembly.handover import handover_error
from rewriter.assembly.plan_file import restore, save_plan
from rewriter.assembly.several_graphs import (
    DECODER_FILES,
    cache_names,
    carried_over,
    open_decoder,
    read_siblings,
    rewritten,
)
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.benchmark.cached_decoder import Shape, cached_decoder, write_folder
from rewriter.core.errors import ModelError
from rewriter.core.option import Plan
from rewriter.core.passes_registry import discover
from rewriter.core.site import Recognition, Site
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.merged import join_merged, split_merged
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.graph.reading import from_checked_proto
from rewriter.runtimes.standard import to_standard

PASSES = {name: one.permitted() for name, one in discover().items()}
SHAPES = {"llama": Shape(), "gpt2": Shape("gpt2", kv_heads=4)}
FORMS = ("heads=1", "key=12,value=12", "key_latent=16,value_latent=24", "value=12")
PREFILL, WITH_PAST, MERGED = DECODER_FILES


def merge(folder: Path) -> Path:
    """As Optimum merges: one `If`, weights outside of the branches, names of outputs inside and outside alike."""
    prefill, past = (onnx.load(folder / name) for name in (PREFILL, WITH_PAST))
    kept: dict[bytes, TensorProto] = {}
    for model, tag in ((past, "with_past"), (prefill, "no_past")):
        names = {}
        for tensor in model.graph.initializer:
            key = repr((tensor.data_type, tuple(tensor.dims))).encode() + tensor.raw_data
            if key not in kept:
                kept[key] = TensorProto()
                kept[key].CopyFrom(tensor)
                kept[key].name = f"{tag}.{tensor.name}"
            names[tensor.name] = kept[key].name
        for node in model.graph.node:
            node.input[:] = [names.get(one, one) for one in node.input]
    bodies = {
        f"{branch}_branch": helper.make_graph(list(model.graph.node), branch, [], list(model.graph.output))
        for branch, model in (("then", past), ("else", prefill))
    }
    outputs = list(past.graph.output)
    node = helper.make_node("If", ["use_cache_branch"], [one.name for one in outputs], name="optimum::if", **bodies)
    inputs = [*past.graph.input, helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])]
    graph = helper.make_graph([node], "merged", inputs, outputs, list(kept.values()))
    onnx.save(helper.make_model(graph, opset_imports=past.opset_import, ir_version=9), folder / MERGED)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = merge(write_folder(folder, shape))
    return made


def feeds(batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, 96, (batch, tokens)),
        "attention_mask": np.ones((batch, tokens), np.int64),
    }


def graph_of(kind: str, past: bool) -> OnnxGraph:
    return OnnxGraph(from_checked_proto(cached_decoder(SHAPES[kind], past), Path("decoder.onnx")))


@cache
def prefill(kind: str) -> tuple[OnnxGraph, Recognition]:
    graph = graph_of(kind, False)
    return graph, recognise(graph)


@cache
def solved(kind: str, form: str) -> dict[str, Site]:
    graph, found = prefill(kind)
    plan = Plan.parse("\n".join(f"low_rank_cache{{{form}}}@{site.id}" for site in found.attention))
    return assemble(graph, found.sites, plan, PASSES, [feeds(8, 24, seed) for seed in range(3)]).sites


def run(path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, given), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SHAPES)
def test_tokens_by_prefill_and_decode_are_those_of_one_run(kind: str, form: str) -> None:
    graph, found = prefill(kind)
    past = graph_of(kind, True)
    others = recognise(past).sites
    after = solved(kind, form)
    sites = carried_over(found.sites, after, others)
    first, second = lower(graph, after.values()), lower(past, sites)
    names = cache_names(first, list(after.values())), cache_names(second, sites)
    assert handover_error(first, second, names, feeds(3, 12, 9), tokens=5) < 1e-12
    assert handover_error(second, second, (names[1], names[1]), feeds(3, 12, 9), tokens=5, steps=3) < 1e-12
    given = feeds(4, 20, 5)
    wanted, got = (Interpreter(one).run(given)["logits"] for one in (graph, first))
    assert 1e-7 < float(((got - wanted) ** 2).sum() / ((wanted - wanted.mean((0, 1))) ** 2).sum()) < 0.15


@pytest.mark.parametrize("kind", SHAPES)
def test_all_files_of_a_folder_are_rewritten_alike(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    decoder = open_decoder(folders[kind])
    assert decoder.together and decoder.graph.path == folders[kind] / PREFILL
    found = recognise(decoder.graph)
    siblings = read_siblings(decoder.siblings, found.sites)
    assert [one.file for one in siblings] == [WITH_PAST, MERGED] and siblings[1].merged is not None
    after = solved(kind, "key_latent=16,value_latent=24")
    to_standard(lower(decoder.graph, after.values())).save(tmp_path / PREFILL)
    for one in siblings:
        rewritten(one, found.sites, after).save(tmp_path / one.file)
    given = feeds(2, 10, 3)
    whole = run(tmp_path / PREFILL, given)
    first = run(tmp_path / PREFILL, {name: array[:, :9] for name, array in given.items()})
    past = {name.replace("present", "past_key_values"): v for name, v in first.items() if name != "logits"}
    assert past["past_key_values.0.key"].shape[1::2] == (1, 16)
    last = {"input_ids": given["input_ids"][:, 9:], "attention_mask": given["attention_mask"], **past}
    apart = run(tmp_path / WITH_PAST, last)
    merged = run(tmp_path / MERGED, {**last, "use_cache_branch": np.array([True])})
    nothing = {name: array[:, :, :1] * 0 for name, array in past.items()}
    again = run(tmp_path / MERGED, {**given, **nothing, "use_cache_branch": np.array([False])})
    np.testing.assert_allclose(apart["logits"][:, 0], whole["logits"][:, 9], atol=1e-5)
    np.testing.assert_allclose(merged["logits"], apart["logits"], atol=1e-5)
    np.testing.assert_allclose(again["logits"], whole["logits"], atol=1e-5)
    assert (tmp_path / MERGED).stat().st_size < 1.4 * (tmp_path / PREFILL).stat().st_size


def test_a_merged_file_alone_is_split(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / MERGED).write_bytes((folders["llama"] / MERGED).read_bytes())
    decoder = open_decoder(tmp_path)
    assert decoder.together and [path.name for path in decoder.siblings] == [MERGED]
    assert [spec.name for spec in decoder.graph.inputs] == ["input_ids", "attention_mask"]
    assert all(site.state == "lowerable" for site in recognise(decoder.graph).sites)


def test_branches_apart_and_together_again(folders: dict[str, Path], tmp_path: Path) -> None:
    graph = load(folders["llama"] / MERGED)
    branches = split_merged(graph)
    assert branches is not None and split_merged(load(folders["llama"] / PREFILL)) is None
    joined = join_merged(graph, (branches[0].graph, branches[1].graph))
    assert [str(spec) for spec in joined.inputs] == [str(spec) for spec in graph.inputs]
    assert [str(spec) for spec in joined.outputs] == [str(spec) for spec in graph.outputs]
    joined.save(tmp_path / MERGED)
    given = feeds(2, 6)
    past = {
        f"past_key_values.{i}.{part}": np.zeros((2, 2, 1, 16), np.float32) for i in (0, 1) for part in ("key", "value")
    }
    given |= past | {"use_cache_branch": np.array([False])}
    before, after = run(folders["llama"] / MERGED, given), run(tmp_path / MERGED, given)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5)


def test_another_model_among_the_files_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, SHAPES["llama"])
    onnx.save(cached_decoder(SHAPES["llama"], True, seed=1), tmp_path / WITH_PAST)
    decoder = open_decoder(tmp_path)
    with pytest.raises(ModelError, match="other weights"):
        read_siblings(decoder.siblings, recognise(decoder.graph).sites)


def test_a_plan_file_holds_smaller_caches(tmp_path: Path) -> None:
    graph, found = prefill("llama")
    after = solved("llama", "key=8,value=8")
    plan = Plan.parse("\n".join(f"low_rank_cache{{key=8,value=8}}@{site.id}" for site in found.attention))
    save_plan(tmp_path, graph, plan, found.sites, after.values())
    _, sites = restore(graph, found.sites, tmp_path)
    again = lower(graph, [sites.get(site.id, site) for site in found.sites])
    assert again.fingerprint() == lower(graph, [after[site.id] for site in found.sites]).fingerprint()
