"""Tiny exported models with their sites and feeds, shared by the tests of assembly."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.core.option import Option, Plan
from rewriter.core.site import AttentionSite, FeedForwardSite, Recognition, Site
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from tests.attention import exported

Feeds = dict[str, np.ndarray]


@cache
def model(name: str) -> tuple[OnnxGraph, Recognition]:
    """A graph of tests/attention/exported.py with what is recognised in it."""
    graph = getattr(exported, name)()
    return graph, recognise(graph)


def feeds(graph: OnnxGraph, seed: int, count: int, size: int = 16, length: int = 12) -> list[Feeds]:
    """Batches with right padding of different lengths."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        lengths = rng.integers(length // 2, length + 1, size)
        batch: Feeds = {}
        for spec in graph.inputs:
            if spec.dtype.kind == "f":
                batch[spec.name] = rng.standard_normal((size, *spec.shape[1:])).astype(np.float32)
            elif spec.name == "attention_mask":
                batch[spec.name] = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
            else:
                batch[spec.name] = rng.integers(3, 60, (size, length))
        batches.append(batch)
    return batches


def error(graph: OnnxGraph, sites: list[Site], batches: list[Feeds]) -> float:
    """Squared difference to the original over the original's spread, on tokens that are no padding."""
    lowered = lower(graph, sites)
    lost = total = 0.0
    for batch in batches:
        before, after = (next(iter(Interpreter(one).run(batch).values())) for one in (graph, lowered))
        mask = batch.get("attention_mask")
        valid = torch.ones(before.shape[:2], dtype=torch.bool) if mask is None else torch.from_numpy(mask).bool()
        valid = valid if valid.shape == before.shape[:2] else torch.ones(before.shape[:2], dtype=torch.bool)
        lost += float(((after - before)[valid] ** 2).sum())
        total += float(((before[valid] - before[valid].mean(dim=0)) ** 2).sum())
    return lost / total


def uniform(found: Recognition, **levels: int) -> Plan:
    """``keep``, ``qk``, ``vo`` at every attention and ``width`` at every feed-forward."""
    names = {"keep": "head_pruning", "qk": "low_rank_qk", "vo": "low_rank_vo", "width": "ffn_pruning"}
    parameters = {"keep": "keep", "qk": "rank", "vo": "rank", "width": "width"}
    options = []
    for site in found.sites:
        kinds = ("keep", "qk", "vo") if isinstance(site, AttentionSite) else ("width",)
        for kind in kinds:
            if kind in levels and isinstance(site, AttentionSite | FeedForwardSite):
                options.append(Option.of(names[kind], site.id, **{parameters[kind]: levels[kind]}))
    return Plan.of(options)
