"""Torch models in all their forms: what is known of each site, and the fx nodes and parameters it came from.

Twelve ways of writing attention in five forms. Each cell asserts the whole state, so nothing hides behind a refusal. An
export takes seconds, so families take turns here; ``python -m tests.torch_graphs.table`` runs the whole table.
"""

from __future__ import annotations

from typing import Any

import pytest

from rewriter.core.errors import OptionError
from rewriter.torch_graphs.sites import read
from tests.torch_graphs.blocks import in_form
from tests.torch_graphs.table import check

CELLS = (
    ("sdpa", "exported"),
    ("causal", "decomposed"),
    ("eager", "symbolic_trace"),
    ("filled", "graph_module"),
    ("capped", "module"),
    ("biased", "decomposed"),
    ("rotary", "symbolic_trace"),
    ("packed", "decomposed"),
    ("cross", "exported"),
    ("normed", "module"),
    ("layer", "symbolic_trace"),
    ("layer", "decomposed"),
    ("shared", "graph_module"),
)


@pytest.mark.parametrize(("name", "form"), CELLS)
def test_every_family_in_every_form(name: str, form: str) -> None:
    check(name, form)


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
