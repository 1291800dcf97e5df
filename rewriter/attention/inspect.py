"""What was recognised, as plain data for people and programs: the JSON of `optimize inspect`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rewriter.attention.flops import TOKENS, Cost, cost, total
from rewriter.core.refusal import Refusal
from rewriter.core.site import AttentionSite, FeedForwardSite, Recognition, Site
from rewriter.graph.onnx import OnnxGraph

Refusals = Callable[[Site], Mapping[str, Refusal | None]]


def describe(recognition: Recognition, graph: OnnxGraph, refusals: Refusals) -> dict[str, Any]:
    """``{"attention": [...], "feed_forward": [...], "unrecognised": [...]}``, in data-flow order.

    `refusals` says for each rewrite why it does not apply to a site, or None. Shares of operations are among the
    sites (one sequence of 128 tokens), shares of parameters of all numbers the model stores.
    """
    everything = total(recognition.sites, 1, TOKENS)
    stored = _stored(graph)

    def shared(site: Site) -> dict[str, Any]:
        return _shares(cost(site, 1, TOKENS), everything, stored) | _verdicts(site, refusals)

    return {
        "attention": [_attention(site) | shared(site) for site in recognition.attention],
        "feed_forward": [_feed_forward(site) | shared(site) for site in recognition.feed_forward],
        "unrecognised": [
            {"node": entry.node, "code": entry.refusal.code, "why": entry.refusal.why}
            for entry in recognition.unrecognised
        ],
    }


def _attention(site: AttentionSite) -> dict[str, Any]:
    return {
        "id": site.id,
        "state": site.state.value,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "qk_dim": site.qk_dim,
        "v_dim": site.v_dim,
        "scale": site.scale,
        "softcap": site.softcap,
        "mask": site.mask,
        "causal": site.causal,
        "position": site.position,
        "cache": site.cached,
        "cross": site.cross,
        "nodes": list(site.nodes),
        "problems": [_problem(problem) for problem in site.problems],
    }


def _feed_forward(site: FeedForwardSite) -> dict[str, Any]:
    return {
        "id": site.id,
        "state": site.state.value,
        "width": site.width,
        "activation": site.activation,
        "gated": site.gate_CF is not None,
        "nodes": list(site.nodes),
        "problems": [_problem(problem) for problem in site.problems],
    }


def _problem(problem: Refusal) -> dict[str, Any]:
    return {"code": problem.code, "why": problem.why, "nodes": list(problem.nodes)}


def _shares(mine: Cost, everything: Cost, stored: int) -> dict[str, float]:
    return {
        "flops_share": mine.flops / everything.flops if everything.flops else 0.0,
        "parameters_share": mine.parameters / stored if stored else 0.0,
    }


def _verdicts(site: Site, refusals: Refusals) -> dict[str, Any]:
    verdicts = {
        name: "ok" if refusal is None else {"refused": refusal.code, "why": refusal.why}
        for name, refusal in refusals(site).items()
    }
    return {"rewrites": verdicts}


def _stored(graph: OnnxGraph) -> int:
    tensors = [value.const_value for value in graph.constants.values()]
    return sum(int(tensor.size) for tensor in tensors if tensor is not None)
