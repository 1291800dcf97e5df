"""Torch models in all their forms: what is known of each site, and the fx nodes and parameters it came from.

Twelve ways of writing attention in five forms. Each cell that runs asserts the whole state, so nothing hides behind a
refusal; an export takes seconds, so each family takes two forms, in turn, and `sdpa` all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewriter.core.errors import OptionError
from rewriter.core.site import State
from rewriter.torch_graphs.sites import TorchSites, read
from rewriter.torch_graphs.splice import splice
from tests.torch_graphs.blocks import FAMILIES, FORMS, in_form

TURNS = (("exported", "decomposed"), ("symbolic_trace", "decomposed"), ("graph_module",), ("symbolic_trace",))
CELLS = [("sdpa", form) for form in FORMS] + [
    (name, TURNS[place % 4][0]) for place, name in enumerate(FAMILIES) if name not in ("sdpa", "layer")
]
CELLS += [("layer", "decomposed"), ("layer", "symbolic_trace"), ("packed", "decomposed"), ("rotary", "decomposed")]


@pytest.mark.parametrize(("name", "form"), sorted(set(CELLS)))
def test_every_family_in_every_form(name: str, form: str) -> None:
    model, example = in_form(name, form)
    found = read(model, **example)
    family = FAMILIES[name]
    attention = found.recognition.attention
    assert not found.recognition.unrecognised
    assert len(attention) == len(found.recognition.feed_forward) == family.attentions
    assert {site.state for site in found} == {State.LOWERABLE}, [site.problems for site in found]
    assert all((site.heads, site.qk_dim, site.v_dim) == (4, 6, 6) for site in attention)
    _knows_where_it_came_from(found)
    _is_the_identity_in_fx(found)


def _knows_where_it_came_from(found: TorchSites) -> None:
    """Every site has fx nodes of the graph that is rewritten, no two share one, and every weight a parameter."""
    names = {node.name for node in found.bridge.host.graph.nodes}
    known = {*dict(found.bridge.host.named_parameters(remove_duplicate=False))}
    seen: set[str] = set()
    for site in found.recognition.attention:
        nodes = set(found.fx_nodes(site))
        assert nodes and nodes <= names and not nodes & seen
        seen |= nodes
        parameters = found.parameters(site)
        assert set(parameters) >= {"query.weight", "key.weight", "value.weight", "output.weight"}
        assert {name for origin in parameters.values() for name in origin} <= known


def _is_the_identity_in_fx(found: TorchSites) -> None:
    """All sites written anew, with nothing rewritten: the same numbers, from other nodes."""
    sites = {site.id: site for site in found}
    made = splice(found.matches, sites, sites)
    assert not made.refused
    args, kwargs = found.bridge.example
    with torch.no_grad():
        expected, actual = found.bridge.host(*args, **kwargs), made.module(*args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    left = {node.name for node in made.module.graph.nodes}
    cores = [name for site in found.recognition.attention for name in found.fx_nodes(site)]
    assert not {name for name in cores if "softmax" in name or "bmm" in name} & left


def test_weights_of_a_packed_projection_share_its_name() -> None:
    model, example = in_form("packed", "exported")
    found = read(model, **example)
    site = found["layers.0.attention"]
    parameters = found.parameters(site)
    assert {parameters[f"{role}.weight"] for role in ("query", "key", "value")} == {("packed.weight",)}
    assert parameters["output.weight"] == ("output.weight",)
    with pytest.raises(OptionError, match=r"layers\.9"):
        found["layers.9.attention"]


def test_the_description_names_fx_nodes_and_parameters() -> None:
    import rewriter

    model, example = in_form("eager", "symbolic_trace")
    entry: dict[str, Any] = rewriter.inspect(model, **example)["attention"][0]
    assert {"query", "key", "value", "output"} <= set(entry["fx_nodes"])
    assert entry["parameters"]["query.weight"] == ["query.weight"]
    assert entry["state"] == "lowerable"
    assert entry["rewrites"]["head_pruning"] == "ok"
