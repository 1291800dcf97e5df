from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.exact_cleanup import key_bias_refusal, scale_refusal, value_bias_refusal
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, Site
from tests.passes.contract import ExactContract
from tests.passes.reference import TARGET, Case, attention_case, output

OPTION = Option.of("exact_cleanup", "layers.0.attention")


def attention(case: Case) -> AttentionSite:
    assert isinstance(case.site, AttentionSite)
    return case.site


def clean(case: Case) -> Site:
    return discover()["exact_cleanup"].apply(case.site, OPTION, None)


class TestExactCleanup(ExactContract):
    name = "exact_cleanup"

    def cases(self) -> list[Case]:
        return [
            attention_case(0),
            attention_case(1, mask="causal", tokens=9),
            attention_case(2, kv_heads=2, mask="heads"),
            attention_case(3, rotary=True, dtype=np.float32),
            attention_case(4, mask="none", empty_rows="zero"),
        ]

    def refused(self) -> dict[str, Site]:
        bare = attention(attention_case(0, biases=False))
        return {
            "nothing-to-do": replace(bare, scale=1.0),
            "head-norm": attention_case(0, norm=True, biases=False).site,
            "value-escapes": replace(bare, escapes=("probabilities",)),
            "cache-in-signature": replace(bare, key=replace(bare.key, present="present.0.key")),
        }

    def test_same_function(self) -> None:
        for case in self.cases():
            tolerance = 1e-12 if case.site.output.weight_HDC.dtype == np.float64 else 1e-5  # type: ignore[union-attr]
            np.testing.assert_allclose(
                output(clean(case), case.values), output(case.site, case.values), rtol=tolerance, atol=tolerance
            )

    def test_does_all_three(self) -> None:
        cleaned = clean(attention_case(0))
        assert isinstance(cleaned, AttentionSite)
        assert cleaned.key.bias_GD is None and cleaned.value.bias_GD is None and cleaned.scale == 1.0
        assert cleaned.query.bias_GD is not None

    def test_second_application_finds_nothing(self) -> None:
        for case in self.cases():
            assert self.subject.options(clean(case), TARGET) == ()

    def test_empty_rows_that_give_nan_may_be_folded(self) -> None:
        case = attention_case(5, mask="empty")
        before, after = output(case.site, case.values), output(clean(case), case.values)
        assert np.isnan(before).any()
        np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12)


class TestEachRefusalHasACounterExample:
    """What would go wrong: the forbidden step changes the output."""

    def changed(self, case: Case, **parts: object) -> float:
        before = output(case.site, case.values)
        return float(np.nanmax(np.abs(output(replace(case.site, **parts), case.values) - before)))  # type: ignore[arg-type]

    @pytest.mark.parametrize("options", [{"rotary": True}, {"softcap": 1.0}])
    def test_key_bias_matters(self, options: dict[str, object]) -> None:
        case = attention_case(0, **options)  # type: ignore[arg-type]
        site = attention(case)
        assert key_bias_refusal(site) is not None
        assert self.changed(case, key=replace(site.key, bias_GD=None)) > 1e-3
        cleaned = clean(case)
        assert isinstance(cleaned, AttentionSite) and cleaned.key.bias_GD is not None

    def test_value_bias_matters_in_empty_rows(self) -> None:
        case = attention_case(0, mask="empty", empty_rows="zero")
        site = attention(case)
        assert value_bias_refusal(site) is not None
        folded = clean(Case(replace(site, empty_rows="nan"), case.values, case.valid_BS))
        assert isinstance(folded, AttentionSite)
        wrong = replace(folded, empty_rows="zero")
        assert np.max(np.abs(output(wrong, case.values) - output(site, case.values))) > 1e-3
        np.testing.assert_allclose(output(clean(case), case.values), output(site, case.values), atol=1e-12)

    def test_a_norm_swallows_the_scale(self) -> None:
        case = attention_case(0, norm=True)
        site = attention(case)
        assert scale_refusal(site) is not None
        assert site.query.weight_CGD is not None
        scaled = replace(site.query, weight_CGD=site.query.weight_CGD * site.scale)
        assert self.changed(case, query=scaled, scale=1.0) > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 4, 8), (4, 2, 6), (6, 1, 4), (1, 1, 8)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal", "heads", "empty"]),
    rotary=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    empty_rows=st.sampled_from(["nan", "zero"]),
    biases=st.booleans(),
)
def test_random_sites_keep_their_function(
    seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, softcap: float, empty_rows: str, biases: bool
) -> None:
    heads, kv_heads, dim = shape
    case = attention_case(
        seed, heads, kv_heads, dim, 12, 3, 7, mask, rotary, softcap=softcap, empty_rows=empty_rows, biases=biases
    )
    subject = discover()["exact_cleanup"]
    for option in subject.options(case.site, TARGET):
        before, after = output(case.site, case.values), output(subject.apply(case.site, option, None), case.values)
        np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-10)
