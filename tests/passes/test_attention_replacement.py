from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.attention_replacement import AttentionReplacement
from rewriter.core.option import Option
from rewriter.core.rewrite import output_weights, with_output_weights
from rewriter.core.site import AttentionSite, LinearSite, ScoreBias, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, output, relative_error, statistics

PASS = AttentionReplacement()


def understood(case: Case) -> Case:
    assert isinstance(case.site, AttentionSite)
    return Case(replace(case.site, mask="padding"), case.values, case.valid_BS)


def alone(case: Case) -> Case:
    """The same attention where every token attends to itself only."""
    site = case.site
    assert isinstance(site, AttentionSite)
    batch, tokens = case.valid_BS.shape
    values = {**case.values, "mask": np.broadcast_to(np.eye(tokens, dtype=bool), (batch, 1, tokens, tokens))}
    return Case(replace(site, bias=ScoreBias("bool", "mask"), mask="window"), values, case.valid_BS)


def option(**parameters: int | str) -> Option:
    return Option.of("attention_replacement", "layers.0.attention", **parameters)


class TestAttentionReplacement(CalibratedContract):
    name = "attention_replacement"

    def cases(self) -> list[Case]:
        return [
            understood(attention_case(0, width=48, batch=24)),
            understood(attention_case(1, heads=4, kv_heads=2, mask="causal", rotary=True, width=32, batch=24)),
            understood(attention_case(2, heads=2, kv_heads=1, mask="none", biases=False, width=64, batch=24)),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        return {
            "cross-attention": replace(site, cross=True),
            "several-sources": replace(site, key=replace(site.key, source="memory")),
            "mask-not-understood": attention_case(0).site,
            "cache-in-signature": replace(site, key=replace(site.key, present="present.0.key")),
            "not-mapped": replace(site, value=replace(site.value, weight_CGD=None)),
        }

    def full(self, case: Case) -> Option:
        return option(**{"with": "identity"})

    def naive(self, case: Case, option: Option) -> Site:
        """Nothing in the attention's place."""
        return PASS.apply(case.site, Option.of(self.name, case.site.id, **{"with": "nothing"}), self.facts(case))

    def test_full_size_is_exact(self) -> None:
        for case in map(alone, self.cases()):
            same = self.subject.apply(case.site, self.full(case), self.facts(case))
            assert isinstance(same, LinearSite) and relative_error(same, case) < 1e-18
            fitted = self.subject.apply(case.site, option(**{"with": "linear"}), self.facts(case))
            assert relative_error(fitted, case) < 1e-4  # its ridge pulls towards zero

    def test_rejects_levels_the_site_does_not_have(self) -> None:
        super_case = self.cases()[0]
        for bad in (option(**{"with": "magic"}), option(), option(**{"with": "linear", "rank": 0})):
            self.assert_rejected(super_case, bad)

    def test_refusals_have_counter_examples(self) -> None:
        """Another mask changes what attention gives, and nothing that replaced it."""
        case = attention_case(3, mask="bool")
        site = case.site
        assert isinstance(site, AttentionSite)
        tokens = case.valid_BS.shape[1]
        other = {
            **case.values,
            "mask": np.broadcast_to(np.eye(tokens, dtype=bool)[None, None], (12, 1, tokens, tokens)),
        }
        assert np.abs(output(site, case.values) - output(site, other))[case.valid_BS].max() > 0.1
        blind = PASS.apply(replace(site, mask="padding"), option(**{"with": "linear"}), statistics(site, case))
        np.testing.assert_array_equal(output(blind, case.values), output(blind, other))

    def test_reduced_rank_is_the_best_of_its_rank(self) -> None:
        """Against the truncated SVD of what the full map makes of the centred input."""
        case = self.cases()[0]
        facts = self.facts(case)
        full, half = (
            PASS.apply(case.site, option(**parameters), facts)
            for parameters in ({"with": "linear"}, {"with": "linear", "rank": 8})
        )
        made, less = (output(site, case.values)[case.valid_BS] for site in (full, half))
        values = np.linalg.svd(made - made.mean(axis=0), compute_uv=False)
        np.testing.assert_allclose(np.sum((made - less) ** 2), np.sum(values[8:] ** 2), rtol=1e-5, atol=1e-12)

    def test_a_bias_is_refitted_and_nothing_stays_nothing(self) -> None:
        case = self.cases()[0]
        bias, nothing = (
            PASS.apply(case.site, option(**{"with": way}), self.facts(case)) for way in ("bias", "nothing")
        )
        assert output_weights(bias).shape == (1, 48)
        moved = with_output_weights(bias, output_weights(bias) + 1.0)
        np.testing.assert_allclose(output(moved, case.values) - output(bias, case.values), 1.0, rtol=1e-6)
        assert with_output_weights(nothing, np.ones((1, 48))) is nothing
        assert not np.any(output(nothing, case.values))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 4, 8), (4, 2, 8), (6, 3, 4), (4, 1, 16)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal"]),
    rotary=st.booleans(),
    biases=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites(
    seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool, dtype: type
) -> None:
    heads, kv_heads, dim = shape
    case = understood(attention_case(seed, heads, kv_heads, dim, 32, 8, 9, mask, rotary, biases=biases, dtype=dtype))
    facts = statistics(case.site, case)
    for one in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, one, facts), case)
