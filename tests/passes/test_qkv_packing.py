from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passes.qkv_packing import QkvPacking
from rewriter.attention.lower import lower
from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.interpreter import Interpreter
from rewriter.runtimes.standard import to_standard
from tests.assembly.tiny import feeds, model
from tests.passes.contract import ExactContract
from tests.passes.reference import TARGET, Case, attention_case, output

PASS = QkvPacking()


class TestQkvPacking(ExactContract):
    name = "qkv_packing"

    def cases(self) -> list[Case]:
        return [attention_case(0), attention_case(1, heads=4, kv_heads=2, rotary=True, biases=False)]

    def refused(self) -> dict[str, Site]:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        return {
            "already-packed": replace(site, packing="kv"),
            "several-sources": replace(site, key=replace(site.key, source="memory")),
            "not-mapped": replace(site, value=replace(site.value, weight_CGD=None)),
        }

    def test_meaning_stays_and_it_comes_apart_again(self) -> None:
        for case in self.cases():
            for option in PASS.options(case.site, TARGET):
                packed = PASS.apply(case.site, option, None)
                np.testing.assert_array_equal(output(packed, case.values), output(case.site, case.values))
                assert PASS.refuse(packed) is not None
                apart = PASS.apply(packed, Option.of(self.name, case.site.id, pack="none"), None)
                assert isinstance(apart, AttentionSite) and not apart.packing

    def test_cross_attention_packs_keys_and_values(self) -> None:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        cross = replace(site, key=replace(site.key, source="m"), value=replace(site.value, source="m"), cross=True)
        assert [option["pack"] for option in PASS.options(cross, TARGET)] == ["kv"]
        with pytest.raises(OptionError):
            PASS.apply(cross, Option.of(self.name, site.id, pack="qkv"), None)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_product_in_the_graph(name: str) -> None:
    graph, found = model(name)
    packed = [PASS.apply(site, PASS.options(site, TARGET)[0], None) for site in found.attention]
    lowered, feed = lower(graph, packed), feeds(graph, 3, 1)[0]
    splits = [node for node in lowered.topological() if node.op_type == "Split" and "attention" in str(node.name)]
    assert len(splits) >= len(packed)
    before, after, standard = (Interpreter(one).run(feed) for one in (graph, lowered, to_standard(lowered)))
    for key, tensor in before.items():
        np.testing.assert_allclose(after[key], tensor, atol=2e-5)
        np.testing.assert_allclose(standard[key], tensor, atol=2e-5)
