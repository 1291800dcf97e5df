"""What took an attention's place goes through assembly, plans and standard ONNX like everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewriter.assembly.assemble import assemble
from rewriter.assembly.plan_file import restore, save_plan
from rewriter.assembly.pricing import price_options
from rewriter.attention.flops import site_flops
from rewriter.attention.lower import lower
from rewriter.core.option import Plan
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, LinearSite
from rewriter.graph.interpreter import Interpreter
from rewriter.runtimes.standard import to_standard
from tests.assembly.tiny import error, feeds, model

PASSES = discover()
WAYS = ("linear,rank=8", "identity", "bias", "nothing")


def replaced(name: str, way: str) -> Plan:
    _, found = model(name)
    sites = [site.id for site in found.attention if PASSES["attention_replacement"].refuse(site) is None]
    return Plan.parse("\n".join(f"attention_replacement{{with={way}}}@{site}" for site in sites))


@pytest.mark.parametrize("way", WAYS)
def test_plan_file_and_standard_onnx_hold_it(way: str, tmp_path: Path) -> None:
    graph, found = model("bert")
    plan = replaced("bert", way)
    built = assemble(graph, found.sites, plan, PASSES, feeds(graph, 0, 8))
    save_plan(tmp_path, graph, plan, found.sites, built.sites.values())
    again, sites = restore(graph, found.sites, tmp_path)
    assert again == plan and any(isinstance(site, LinearSite) for site in sites.values())
    after = [sites.get(site.id, site) for site in found.sites]
    lowered, first = lower(graph, after), feeds(graph, 5, 1)[0]
    assert lowered.fingerprint() == lower(graph, list(built.sites.values())).fingerprint()
    ours, theirs = (Interpreter(one).run(first) for one in (lowered, to_standard(lowered)))
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5)
    assert [spec.shape for spec in lowered.outputs] == [spec.shape for spec in graph.outputs]


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_milder_ways_lose_less_in_every_layout(name: str) -> None:
    graph, found = model(name)
    held_out, losses = feeds(graph, 99, 4), {}
    for way in ("linear", "nothing"):
        built = assemble(graph, found.sites, replaced(name, way), PASSES, feeds(graph, 0, 8), resolve="changed")
        losses[way] = error(graph, list(built.sites.values()), held_out)
        changed = [site for site in built.sites.values() if isinstance(site, LinearSite)]
        assert changed and all(site_flops(site) < site_flops(site.replaces) for site in changed)
    assert losses["linear"] < losses["nothing"]


def test_priced_in_order() -> None:
    graph, found = model("bert")
    first = found.attention[0]
    assert isinstance(first, AttentionSite)
    combinations = [tuple(replaced("bert", way).at(first.id)) for way in ("linear", "bias", "nothing")]
    prices = price_options(graph, found.sites, {first.id: combinations}, PASSES, feeds(graph, 0, 6))[first.id]
    ordered = [prices[combination] for combination in combinations]
    assert ordered == sorted(ordered) and ordered[0] < 1.0


def test_dropped_frequency_pairs_have_tables_per_head(tmp_path: Path) -> None:
    graph, found = model("llama")
    plan = Plan.parse("\n".join(f"low_rank_qk{{rank=4}}@{site.id}" for site in found.attention))
    built = assemble(graph, found.sites, plan, PASSES, feeds(graph, 0, 6), resolve="changed")
    first = built.sites[found.attention[0].id]
    assert isinstance(first, AttentionSite) and first.query.rotary is not None
    assert len(first.query.rotary.keep) == first.heads and first.qk_dim == 4
    lowered, feed = lower(graph, list(built.sites.values())), feeds(graph, 5, 1)[0]
    ours, theirs = (Interpreter(one).run(feed) for one in (lowered, to_standard(lowered)))
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-4)
    save_plan(tmp_path, graph, plan, found.sites, built.sites.values())
    sites = restore(graph, found.sites, tmp_path)[1]
    assert lower(graph, [sites.get(s.id, s) for s in found.sites]).fingerprint() == lowered.fingerprint()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_window_is_the_mask_it_says(name: str) -> None:
    graph, found = model(name)
    wide, narrow = (
        [replace(s, bias=replace(s.bias, window=w, sinks=1)) if not s.cross else s for s in found.attention]
        for w in (64, 2)
    )
    feed = feeds(graph, 5, 1)[0]
    before, after, standard = (
        Interpreter(one).run(feed) for one in (graph, lower(graph, wide), to_standard(lower(graph, narrow)))
    )
    for key in before:
        np.testing.assert_allclose(after[key], before[key], atol=2e-5)
        assert not np.allclose(standard[key], before[key], atol=1e-3)


@pytest.mark.parametrize(("name", "groups"), [("bert", 2), ("llama", 1)])
def test_merged_heads_and_what_follows_them(name: str, groups: int) -> None:
    graph, found = model(name)
    first = found.attention[0].id
    merged = f"kv_merge{{groups={groups}}}@{first}"
    errors = []
    for plan in (merged, f"{merged}\nlow_rank_vo{{rank=4}}@{first}"):
        built = assemble(graph, found.sites, Plan.parse(plan), PASSES, feeds(graph, 0, 8), resolve="changed")
        site = built.sites[first]
        assert isinstance(site, AttentionSite) and site.key.heads == site.value.heads == groups
        errors.append(error(graph, list(built.sites.values()), feeds(graph, 99, 4)))
    assert errors[0] <= errors[1] * 1.05 and errors[1] < 1.0
    (options,) = [tuple(Plan.parse(plan).at(first))]
    price = price_options(graph, found.sites, {first: [options[:1], options]}, PASSES, feeds(graph, 0, 6))[first]
    assert price[options[:1]] <= price[options] * 1.05
