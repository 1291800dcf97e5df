from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passes.fused_sdpa import FusedSdpa
from rewriter.attention.lower import lower
from rewriter.core.errors import OptionError
from rewriter.core.forms import FORMS, picked
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.composites import is_composite
from tests.assembly.tiny import model
from tests.passes.contract import ExactContract
from tests.passes.reference import TARGET, Case, attention_case, output

PASS = FusedSdpa()


class TestFusedSdpa(ExactContract):
    name = "fused_sdpa"

    def cases(self) -> list[Case]:
        return [attention_case(0), attention_case(1, heads=4, kv_heads=2, rotary=True, biases=False)]

    def refused(self) -> dict[str, Site]:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        return {"not-mapped": replace(site, value=replace(site.value, weight_CGD=None))}

    def test_no_form_changes_a_number(self) -> None:
        for case in self.cases():
            for option in PASS.options(case.site, TARGET):
                chosen = PASS.apply(case.site, option, None)
                np.testing.assert_array_equal(output(chosen, case.values), output(case.site, case.values))

    def test_every_runtime_takes_the_latest_form_that_it_has(self) -> None:
        site: Site = attention_case(0).site
        for form in ("decomposed", "attention"):
            site = PASS.apply(site, Option.of(self.name, site.id, form=form), None)
        assert isinstance(site, AttentionSite)
        forms = {runtime: picked(site.forms, runtime) for runtime in FORMS}
        assert forms == {"tvm": "decomposed", "onnxruntime": "attention", "torch": "decomposed"}
        assert {picked((), runtime) for runtime in FORMS} == {"flash", "decomposed", "sdpa"}

    def test_forms_that_cannot_be_are_not_offered(self) -> None:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        offered = {str(option["form"]) for option in PASS.options(replace(site, softcap=5.0), TARGET)}
        assert not offered & {"multi_head_attention", "packed_attention"}
        turned = attention_case(1, rotary=True).site
        assert "packed_attention" not in {option["form"] for option in PASS.options(turned, TARGET)}
        with pytest.raises(OptionError, match="names no form"):
            PASS.apply(site, Option.of(self.name, site.id, form="fast"), None)


def test_the_form_is_in_the_graph() -> None:
    graph, found = model("bert")
    sites = [PASS.apply(site, Option.of("fused_sdpa", site.id, form="attention"), None) for site in found.attention]
    nodes = [node for node in lower(graph, sites).topological() if is_composite(node, "Attention")]
    assert nodes and all(list(node.attributes["forms"].as_strings()) == ["attention"] for node in nodes)
