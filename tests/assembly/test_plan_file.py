from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rewriter.assembly.assemble import assemble
from rewriter.assembly.plan_file import load_plan, restore, save_plan
from rewriter.attention.lower import lower
from rewriter.core.errors import DataError, OutputError
from rewriter.core.option import Plan
from rewriter.core.passes_registry import discover
from rewriter.core.site import FeedForwardSite
from tests.assembly.tiny import feeds, model, uniform

PASSES = discover()


def written(folder: Path, name: str = "bert") -> tuple[Plan, bytes]:
    graph, found = model(name)
    levels = {"keep": 2, "vo": 4, "width": 24} if name == "llama" else {"keep": 3, "qk": 3, "vo": 5, "width": 24}
    plan = uniform(found, **levels)
    sites = list(assemble(graph, found.sites, plan, PASSES, feeds(graph, 0, 4)).sites.values())
    save_plan(folder, graph, plan, found.sites, sites)
    lower(graph, sites).save(folder / "first.onnx")
    return plan, (folder / "first.onnx").read_bytes()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_same_graph_byte_for_byte_without_data(tmp_path: Path, name: str) -> None:
    plan, wanted = written(tmp_path, name)
    graph, found = model(name)
    restored, sites = restore(graph, found.sites, tmp_path / "plan.json")
    assert restored == plan == load_plan(tmp_path)
    lower(graph, [sites.get(site.id, site) for site in found.sites]).save(tmp_path / "second.onnx")
    assert (tmp_path / "second.onnx").read_bytes() == wanted


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name)
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_unchanged_sites_are_left_out(tmp_path: Path) -> None:
    graph, found = model("bert")
    save_plan(tmp_path, graph, Plan(), found.sites, found.sites)
    assert restore(graph, found.sites, tmp_path) == (Plan(), {})


def test_small_floats_survive(tmp_path: Path) -> None:
    graph, found = model("bert")
    site = found.feed_forward[0]
    brief = replace(site, down_FC=site.down_FC.astype(ml_dtypes.bfloat16), up_bias_F=None)
    save_plan(tmp_path, graph, Plan(), found.sites, [brief])
    back = restore(graph, found.sites, tmp_path)[1][site.id]
    assert isinstance(back, FeedForwardSite) and back.up_bias_F is None
    assert back.down_FC.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back.down_FC.view(np.uint16), brief.down_FC.view(np.uint16))


def test_another_model_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    graph, found = model("gpt2")
    with pytest.raises(DataError, match="another model"):
        restore(graph, found.sites, tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    written(tmp_path)
    graph, found = model("bert")
    tensors = (tmp_path / "plan.safetensors").read_bytes()
    (tmp_path / "plan.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(DataError, match="damaged"):
        restore(graph, found.sites, tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(DataError, match="cannot read"):
        restore(graph, found.sites, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "model": 1, "plan": [1], "sites": {}}']
)
def test_nonsense(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DataError):
        load_plan(tmp_path / "plan.json")


def test_unknown_site_field_and_format(tmp_path: Path) -> None:
    written(tmp_path)
    graph, found = model("bert")
    whole = json.loads((tmp_path / "plan.json").read_text())
    site = next(iter(whole["sites"]))
    for change in (
        {"format": 99},
        {"sites": {"layers.9.attention": whole["sites"][site]}},
        {"sites": {site: {"fields": {"nonsense": 1}, "arrays": {}}}},
        {"sites": {site: {"fields": {}, "arrays": {"missing": "float32"}}}},
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError):
            restore(graph, found.sites, tmp_path)


def test_missing_places(tmp_path: Path) -> None:
    graph, found = model("bert")
    with pytest.raises(DataError, match="cannot read"):
        load_plan(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(OutputError):
        save_plan(tmp_path / "nowhere", graph, Plan(), found.sites, [])


def test_number_formats_travel_with_the_plan(tmp_path: Path) -> None:
    graph, found = model("bert")
    plan = Plan.parse("\n".join(f"precision{{dtype=int8}}@{site.id}" for site in found.sites[:2]))
    sites = list(assemble(graph, found.sites, plan, PASSES, feeds(graph, 0, 4)).sites.values())
    assert [site.precision for site in sites[:3]] == ["int8", "int8", "fp32"]
    save_plan(tmp_path, graph, plan, found.sites, sites)
    _, restored = restore(graph, found.sites, tmp_path)
    lowered = lower(graph, [restored.get(site.id, site) for site in found.sites])
    linears = [node for node in lowered.model.graph if node.op_type == "Linear"]
    rounded = [node for node in linears if "precision" in node.attributes]
    assert len(rounded) == 6 and {node.attributes["precision"].as_string() for node in rounded} == {"int8"}
    assert lowered.fingerprint() == lower(graph, sites).fingerprint()
