from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.ffn_pruning import FfnPruning
from rewriter.core.obs import RidgeProblem, improve_columns
from rewriter.core.option import Option
from rewriter.core.rewrite import RIDGE, output_weights
from rewriter.core.site import FeedForwardSite, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, feed_forward_case, relative_error, statistics

PASS = FfnPruning()


def block(case: Case) -> FeedForwardSite:
    assert isinstance(case.site, FeedForwardSite)
    return case.site


class TestFfnPruning(CalibratedContract):
    name = "ffn_pruning"

    def cases(self) -> list[Case]:
        return [
            feed_forward_case(0),
            feed_forward_case(1, gated=True, activation="silu"),
            feed_forward_case(2, hidden=96, activation="tanh", width=24),
        ]

    def refused(self) -> dict[str, Site]:
        site = block(feed_forward_case(0))
        return {
            "too-narrow": feed_forward_case(0, hidden=16).site,
            "value-escapes": replace(site, escapes=("hidden",)),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, width=block(case).width)

    def naive(self, case: Case, option: Option) -> Site:
        """Magnitude of the unit's weights, no refit."""
        site = block(case)
        size = np.linalg.norm(site.up_CF, axis=0) * np.linalg.norm(site.down_FC, axis=1)
        return site.keep_units(tuple(int(u) for u in np.sort(np.argsort(-size)[: option.integer("width")])))

    def test_levels_are_what_tiles_like(self) -> None:
        site = FeedForwardSite("f", "x", np.zeros((4, 1536)), None, np.zeros((1536, 4)), None, "y")
        wide = PASS.options(replace(site, state=block(self.cases()[0]).state), TARGET)
        assert [option.integer("width") for option in wide] == [1280, 1152, 1024, 896, 768, 640, 512, 384]

    def test_losses_of_the_sweep_are_exact(self) -> None:
        for case in self.cases():
            facts = statistics(case.site, case)
            problem = RidgeProblem.of(facts.regression, output_weights(case.site), RIDGE)
            for option, loss in PASS.losses(case.site, facts).items():
                order = PASS._sweep(case.site, facts).order
                swept = problem.loss(np.sort(order[block(case).width - option.integer("width") :]))
                np.testing.assert_allclose(loss, swept, rtol=1e-6, atol=1e-7 * problem.constant)

    def test_swaps_only_help(self) -> None:
        better = 0
        for case in self.cases():
            facts = statistics(case.site, case)
            problem, losses = (
                RidgeProblem.of(facts.regression, output_weights(case.site), RIDGE),
                PASS.losses(case.site, facts),
            )
            for option in losses:
                kept = PASS.feature_map(case.site, option, facts)
                assert kept is not None and len(set(kept.tolist())) == option.integer("width")
                assert problem.loss(kept) <= losses[option] * (1 + 1e-9) + 1e-9
                better += problem.loss(kept) < losses[option] * (1 - 1e-6)
        assert better

    def test_a_bad_choice_is_swapped_away(self) -> None:
        """Starting from the units that are missed most being gone, swaps come close to the sweep."""
        case = self.cases()[0]
        facts = statistics(case.site, case)
        problem = RidgeProblem.of(facts.regression, output_weights(case.site), RIDGE)
        order = PASS._sweep(case.site, facts).order
        found = improve_columns(problem, np.sort(order[:32]), rounds=40, share=0.5)
        assert problem.loss(found) <= 1.5 * problem.loss(np.sort(order[32:])) < problem.loss(np.sort(order[:32]))

    def test_constant_and_duplicate_units_leave_for_free(self) -> None:
        case = feed_forward_case(3)
        site = block(case)
        up, bias = site.up_CF.copy(), np.array(site.up_bias_F)
        up[:, 40:48] = 0.0
        up[:, 48:56], bias[48:56] = up[:, :8], bias[:8]
        idle = Case(replace(site, up_CF=up, up_bias_F=bias), case.values, case.valid_BS)
        pruned = PASS.apply(idle.site, Option.of(self.name, site.id, width=48), statistics(idle.site, idle))
        assert relative_error(pruned, idle) < 1e-3


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    hidden=st.sampled_from([32, 48, 80]),
    gated=st.booleans(),
    activation=st.sampled_from(["relu", "silu", "tanh", "identity"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_blocks(seed: int, hidden: int, gated: bool, activation: str, dtype: type) -> None:
    case = feed_forward_case(seed, hidden, 12, gated, activation, 8, 9, dtype)
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
