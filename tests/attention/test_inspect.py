from __future__ import annotations

import json

import jsonschema
import pytest

from rewriter.attention.inspect import describe
from rewriter.core.refusal import Refusal
from rewriter.core.site import Recognition, Unrecognised
from rewriter.inspection import refusals
from rewriter.report.inspection_page import inspection_page
from tests.attention import exported

TEXT, NUMBER, WHOLE, FLAG = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
TEXTS = {"type": "array", "items": TEXT}


def _object(extra: dict[str, object] | None = None, **required: object) -> dict[str, object]:
    properties = {**required, **(extra or {})}
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


REFUSED = _object(refused=TEXT, why=TEXT)
PROBLEM = _object(code=TEXT, why=TEXT, nodes=TEXTS)
SITE = {
    "id": TEXT,
    "state": {"enum": ["found", "mapped", "lowerable"]},
    "nodes": TEXTS,
    "rewrites": {"type": "object", "additionalProperties": {"anyOf": [{"const": "ok"}, REFUSED]}},
}
# beyond what the format promises: what the page prints
MORE = {"flops_share": NUMBER, "parameters_share": NUMBER, "problems": {"type": "array", "items": PROBLEM}}
ATTENTION = _object(
    MORE,
    **SITE,
    **dict.fromkeys(("heads", "kv_heads", "qk_dim", "v_dim"), WHOLE),
    **dict.fromkeys(("scale", "softcap"), NUMBER),
    **dict.fromkeys(("causal", "cache", "cross"), FLAG),
    mask={"enum": ["none", "padding", "causal", "window", "additive", "opaque"]},
    position={"enum": ["none", "rotary", "bias", "opaque"]},
)
FEED_FORWARD = _object(MORE, **SITE, width=WHOLE, activation=TEXT, gated=FLAG)
UNRECOGNISED = _object({"code": TEXT}, node=TEXT, why=TEXT)
SCHEMA = _object(
    attention={"type": "array", "items": ATTENTION},
    feed_forward={"type": "array", "items": FEED_FORWARD},
    unrecognised={"type": "array", "items": UNRECOGNISED},
)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "exposed", "mixing", "router"])
def test_the_json_has_the_shape_that_is_promised(name: str) -> None:
    if name == "router":
        graph = exported.negative("router")
    else:
        graph = getattr(exported, name)() if hasattr(exported, name) else exported.block(**{name: True})
    found = describe(exported.recognised(graph), graph, refusals)
    jsonschema.validate(json.loads(json.dumps(found)), SCHEMA)
    assert inspection_page(found)


def test_the_page_gathers_layers_that_are_alike() -> None:
    graph = exported.llama()
    verdicts = {"one": None, "two": Refusal("rotary", "queries are rotated")}
    page = inspection_page(describe(exported.recognised(graph), graph, lambda site: verdicts))
    assert "2 attentions, 2 feed-forwards. Lowerable, that is shown to compute the same" in page
    assert "layers.0-1.attention     self        lowerable  4 / 2 KV  6     rotary" in page
    assert "  layers.0-1.attention: one\n" in page
    assert "  layers.0-1.attention: no two: queries are rotated (rotary)" in page
    assert max(map(len, page.splitlines())) <= 120


def test_the_page_names_what_was_not_understood() -> None:
    graph = exported.block(exposed=True)
    page = inspection_page(describe(exported.recognised(graph), graph, refusals))
    assert "What can be rewritten" not in page
    assert "(exposed-probabilities, at weights)" in page
    assert "layers.0.attention: no rewrite at all: " in page


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
    refusal = Refusal("unknown-score-function", "scores are squared", ("one",))
    found = Recognition((), (), tuple(Unrecognised(node, refusal) for node in ("one", "two")))
    data = describe(found, exported.block(), lambda site: {})
    assert data["unrecognised"][0] == {"node": "one", "code": "unknown-score-function", "why": "scores are squared"}
    assert "one, two: scores are squared (unknown-score-function)" in inspection_page(data)
