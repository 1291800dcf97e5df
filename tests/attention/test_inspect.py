from __future__ import annotations

import json

import pytest

from rewriter.attention.inspect import describe
from rewriter.core.refusal import Refusal
from tests.attention import exported


def test_the_description_is_json_with_every_field() -> None:
    graph = exported.bert("eager")
    text = describe(
        exported.recognised(graph), graph, lambda site: {"one": None, "two": Refusal("too-small", "it is too small")}
    )
    data = json.loads(json.dumps(text))
    assert set(data) == {"attention", "feed_forward", "unrecognised"}
    first = data["attention"][0]
    fields = "id state heads kv_heads qk_dim v_dim scale softcap mask causal position cache cross nodes rewrites"
    assert set(fields.split()) <= set(first)
    assert first["rewrites"] == {"one": "ok", "two": {"refused": "too-small", "why": "it is too small"}}
    shares = [site["flops_share"] for site in (*data["attention"], *data["feed_forward"])]
    assert sum(shares) == pytest.approx(1.0)
    assert all(0 < site["parameters_share"] < 0.5 for site in (*data["attention"], *data["feed_forward"]))


def test_what_is_not_understood_is_listed() -> None:
    graph = exported.block(mixing=True)
    (entry,) = describe(exported.recognised(graph), graph, lambda site: {})["unrecognised"]
    assert entry["code"] == "head-mixing"
    assert entry["node"]
    assert entry["why"]
