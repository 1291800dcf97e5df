from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.core.errors import OptionError
from rewriter.core.obs import RidgeProblem
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.rewrite import RIDGE, output_weights
from rewriter.core.site import AttentionSite, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, relative_error, statistics

PASS = discover()["head_pruning"]


class TestHeadPruning(CalibratedContract):
    name = "head_pruning"

    def cases(self) -> list[Case]:
        return [
            attention_case(0, heads=6, kv_heads=6),
            attention_case(1, heads=8, kv_heads=4, dim=6, batch=16),
            attention_case(2, mask="heads", tokens=10, batch=20),
            attention_case(3, heads=6, kv_heads=1, dim=4, rotary=True),
            attention_case(4, heads=4, norm=True, mask="causal"),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention_case(0).site
        assert isinstance(site, AttentionSite)
        return {
            "one-head": attention_case(0, heads=1, kv_heads=1).site,
            "uneven-groups": replace(site, key=replace(site.key, head_of=(0, 0, 0, 1))),
            "shared-query-heads": replace(site, query=replace(site.query, head_of=(0, 0, 1, 1))),
            "cache-in-signature": replace(site, value=replace(site.value, past="past.0.value")),
            "not-mapped": replace(site, value=replace(site.value, weight_CGD=None)),
        }

    def full(self, case: Case) -> Option:
        assert isinstance(case.site, AttentionSite)
        return Option.of(self.name, case.site.id, keep=case.site.heads)

    def naive(self, case: Case, option: Option) -> Site:
        """Magnitude of value times output, no refit; within groups the same number of heads each."""
        site = case.site
        assert isinstance(site, AttentionSite) and site.output is not None and site.value.weight_CGD is not None
        size = np.array(
            [
                np.linalg.norm(site.value.weight_CGD[:, site.value.head_of[h]] @ site.output.weight_HDC[h])
                for h in range(site.heads)
            ]
        )
        groups = np.array([np.flatnonzero(np.array(site.value.head_of) == g) for g in range(site.kv_heads)])
        keep = option.integer("keep")
        if dict(option.parameters).get("per_group"):
            left = [g[np.argsort(-size[g])[: option.integer("per_group")]] for g in groups]
        else:
            left = list(groups[np.argsort(-size[groups].sum(axis=1))[: keep // groups.shape[1]]])
        return site.keep_heads(tuple(sorted(int(h) for h in np.concatenate(left))))

    def test_grouped_levels_stay_rectangular(self) -> None:
        case = self.cases()[1]
        facts = self.facts(case)
        for option in PASS.options(case.site, TARGET):
            rewritten = PASS.apply(case.site, option, facts)
            assert isinstance(rewritten, AttentionSite)
            counts = np.bincount(rewritten.key.head_of)
            assert len(set(counts.tolist())) == 1 and rewritten.heads == option.integer("keep")
            assert rewritten.key.heads == rewritten.value.heads == len(counts)

    def test_biases_per_head_follow(self) -> None:
        case = self.cases()[2]
        rewritten = PASS.apply(case.site, Option.of(self.name, case.site.id, keep=2), self.facts(case))
        assert isinstance(rewritten, AttentionSite) and rewritten.bias.keep is not None
        assert len(rewritten.bias.keep) == 2

    def test_duplicate_heads_leave_for_free(self) -> None:
        site = attention_case(5, heads=4).site
        assert isinstance(site, AttentionSite)
        twin = {part: _duplicate(getattr(site, part)) for part in ("query", "key", "value")}
        case = attention_case(5, heads=4)
        doubled = Case(replace(site, **twin), case.values, case.valid_BS)
        kept = PASS.apply(doubled.site, Option.of(self.name, site.id, keep=3), statistics(doubled.site, doubled))
        assert relative_error(kept, doubled) < 1e-3

    def test_every_level_of_a_small_site_is_close_to_the_best_of_all_subsets(self) -> None:
        case = attention_case(6, heads=5, kv_heads=5, dim=4)
        facts = statistics(case.site, case)
        for option, loss in PASS.losses(case.site, facts).items():
            best = min(
                _subset_loss(case, subset) for subset in itertools.combinations(range(5), option.integer("keep"))
            )
            assert loss <= best * 1.1 + 1e-9

    def test_a_level_between_groups_is_an_error(self) -> None:
        case = self.cases()[1]
        with pytest.raises(OptionError):
            PASS.apply(case.site, Option.of(self.name, case.site.id, keep=3), self.facts(case))


def _duplicate(part: object) -> object:
    weight = part.weight_CGD.copy()  # type: ignore[attr-defined]
    weight[:, 1] = weight[:, 0]
    bias = part.bias_GD.copy()  # type: ignore[attr-defined]
    bias[1] = bias[0]
    return replace(part, weight_CGD=weight, bias_GD=bias)  # type: ignore[type-var]


def _subset_loss(case: Case, heads: tuple[int, ...]) -> float:
    facts = statistics(case.site, case)
    problem = RidgeProblem.of(facts.regression, output_weights(case.site), RIDGE)
    columns = np.concatenate([np.arange(h * 4, h * 4 + 4) for h in heads])
    return problem.loss(columns)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 4, 4), (4, 2, 4), (6, 3, 2), (4, 1, 4)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal"]),
    rotary=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites_stay_legal(
    seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, softcap: float, dtype: type
) -> None:
    heads, kv_heads, dim = shape
    case = attention_case(seed, heads, kv_heads, dim, 12, 8, 7, mask, rotary, softcap=softcap, dtype=dtype)
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
