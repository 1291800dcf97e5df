from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.low_rank_qk import LowRankQK
from rewriter.core.option import Option
from rewriter.core.pairs import dropping_order, kept_columns, pair_columns, pair_errors
from rewriter.core.site import AttentionSite, Site
from rewriter.core.statistics import AttentionStatistics
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, centred_keys, operand, relative_error, statistics

PASS = LowRankQK()


def attention(case: Case) -> AttentionSite:
    assert isinstance(case.site, AttentionSite)
    return case.site


def partly_rotated(case: Case, size: int, interleaved: bool = False) -> Case:
    """The same attention with only the leading dims of a head rotated."""
    site = attention(case)
    turn = site.query.rotary
    assert turn is not None
    half = replace(turn, size=size, interleaved=interleaved)
    order = np.arange(size // 2).repeat(2) if interleaved else np.tile(np.arange(size // 2), 2)
    tables = {name: np.asarray(case.values[name])[:, order] for name in ("cos", "sin")}
    turned = replace(site, query=replace(site.query, rotary=half), key=replace(site.key, rotary=half))
    return Case(turned, {**case.values, **tables}, case.valid_BS)


class TestLowRankQK(CalibratedContract):
    name = "low_rank_qk"

    def cases(self) -> list[Case]:
        return [
            attention_case(0, heads=3, kv_heads=3, dim=32, width=40, batch=24),
            attention_case(1, heads=4, kv_heads=2, dim=24, width=40, batch=24, mask="bool"),
            attention_case(2, heads=2, kv_heads=1, dim=16, width=24, batch=24, mask="heads", biases=False),
            attention_case(7, heads=3, kv_heads=3, dim=32, width=40, batch=24, mask="none", rotary=True),
            attention_case(8, heads=4, kv_heads=2, dim=24, width=40, batch=24, mask="bool", rotary=True),
            partly_rotated(attention_case(9, heads=4, kv_heads=2, dim=24, width=40, batch=24, rotary=True), 12),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention(attention_case(0))
        return {
            "rotated-apart": replace(site, query=attention(attention_case(0, rotary=True)).query),
            "head-norm": attention_case(0, norm=True).site,
            "sink": replace(site, sink_H=np.zeros(4)),
            "soft-cap": attention_case(0, softcap=2.0).site,
            "cache-in-signature": replace(site, key=replace(site.key, present="present.0.key")),
            "shared-query-heads": replace(site, query=replace(site.query, head_of=(0, 0, 1, 1))),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, rank=attention(case).qk_dim)

    def naive(self, case: Case, option: Option) -> Site:
        """Truncated SVD of W_q W_k' per key head, which knows no data; biases go along. Rotated: pairs by magnitude."""
        site = attention(case)
        if site.query.rotary is not None:
            return by_magnitude(case, option)
        assert site.query.weight_CGD is not None and site.key.weight_CGD is not None
        identity_H = np.einsum("chd,che->hde", site.query.weight_CGD, site.query.weight_CGD)
        identity_G = np.einsum("cgd,cge->gde", site.key.weight_CGD, site.key.weight_CGD)
        facts = statistics(site, case)
        return PASS.apply(site, option, replace(facts, query_HDD=identity_H, key_GDD=identity_G))  # type: ignore[type-var,arg-type]

    def test_refusals_have_counter_examples(self) -> None:
        for case in (rotated_apart(3), attention_case(3, softcap=1.0), attention_case(3, norm=True)):
            bare = replace(
                attention(case),
                softcap=0.0,
                query=replace(attention(case).query, rotary=None, norm=None),
                key=replace(attention(case).key, rotary=None, norm=None),
            )
            inner = Case(bare, case.values, case.valid_BS)
            changed = PASS.apply(bare, self.full(inner), statistics(bare, inner))
            assert isinstance(changed, AttentionSite)
            wrong = replace(
                attention(case),
                query=replace(
                    attention(case).query, weight_CGD=changed.query.weight_CGD, bias_GD=changed.query.bias_GD
                ),
                key=replace(attention(case).key, weight_CGD=changed.key.weight_CGD, bias_GD=None),
            )
            assert relative_error(wrong, case) > 1e-4
            assert relative_error(changed, inner) < 1e-18

    def test_equals_whitened_solution_in_all_of_the_width(self) -> None:
        """The D x D form against the bias-augmented C x C one: truncated SVD of X (Wq Wk') Xc'."""
        case = attention_case(4, heads=2, kv_heads=2, dim=16, width=20, mask="none")
        site, rank = attention(case), 8
        changed = PASS.apply(site, Option.of(self.name, site.id, rank=rank), statistics(site, case))
        assert isinstance(changed, AttentionSite)
        query, key = operand(site.query, case.values), centred_keys(site, case)
        for head in range(2):
            rows = query[:, head][case.valid_BS]
            values = np.linalg.svd(np.linalg.qr(rows, mode="r") @ np.linalg.qr(key[head], mode="r").T)[1]
            left = operand(changed.query, case.values)[:, head][case.valid_BS]
            error = np.linalg.norm(rows @ key[head].T - left @ centred_keys(changed, case)[head].T) ** 2
            np.testing.assert_allclose(error, np.sum(values[rank:] ** 2), rtol=1e-4)

    def test_cost_of_dropped_pairs_is_exact(self) -> None:
        """1' E_DD 1 is the squared change of centred scores, for a group of three heads and any set of pairs."""
        for interleaved in (False, True):
            plain = attention_case(10, heads=3, kv_heads=1, dim=12, width=24, mask="none", rotary=True)
            case = partly_rotated(plain, 12, interleaved)
            site, facts = attention(case), self.facts(case)
            assert isinstance(facts, AttentionStatistics) and facts.products_HDD is not None
            errors = pair_errors(facts.products_HDD.sum(axis=0), 12, interleaved)
            query, key = operand(site.query, case.values), operand(site.key, case.values)
            key = key - key.mean(axis=2, keepdims=True)
            order, costs = dropping_order(errors)
            for count in range(1, 7):
                gone = pair_columns(12, interleaved)[order[:count]].reshape(-1)
                change = np.einsum("bhsd,btd->bhst", query[..., gone], key[:, 0][..., gone])
                np.testing.assert_allclose(np.sum(change**2), costs[count - 1], rtol=1e-10)

    def test_pairs_follow_when_heads_are_pruned(self) -> None:
        case = self.cases()[4]
        cut = PASS.apply(case.site, Option.of(self.name, case.site.id, rank=8), self.facts(case))
        assert isinstance(cut, AttentionSite) and cut.query.rotary is not None and cut.key.rotary is not None
        assert len(cut.query.rotary.keep) == 4 and len(cut.key.rotary.keep) == 2
        one = cut.keep_heads((2, 3))
        assert one.key.rotary is not None and one.key.rotary.keep == cut.key.rotary.keep[1:]
        assert_legal(one, case)

    def test_score_losses_fall_to_zero(self) -> None:
        case = self.cases()[0]
        losses = PASS.score_losses(case.site, statistics(case.site, case))
        ordered = [losses[rank] for rank in sorted(losses)]
        assert all(a >= b for a, b in itertools.pairwise(ordered)) and ordered[-1] == 0.0

    def test_rank_of_the_scores_is_enough(self) -> None:
        case = attention_case(5, heads=2, kv_heads=2, dim=16, width=24, biases=False)
        site = attention(case)
        assert site.query.weight_CGD is not None
        flat = site.query.weight_CGD.copy()
        flat[:, :, 8:] = flat[:, :, :8] @ np.random.default_rng(0).normal(size=(8, 8))
        thin = Case(replace(site, query=replace(site.query, weight_CGD=flat)), case.values, case.valid_BS)
        changed = PASS.apply(thin.site, Option.of(self.name, site.id, rank=8), statistics(thin.site, thin))
        assert relative_error(changed, thin) < 1e-8

    def test_dead_head(self) -> None:
        case = attention_case(6, heads=2, kv_heads=2, dim=16, biases=False)
        site = attention(case)
        assert site.query.weight_CGD is not None
        silent = site.query.weight_CGD.copy()
        silent[:, 0] = 0.0
        dead = Case(replace(site, query=replace(site.query, weight_CGD=silent)), case.values, case.valid_BS)
        assert_legal(PASS.apply(dead.site, Option.of(self.name, site.id, rank=8), statistics(dead.site, dead)), dead)


def by_magnitude(case: Case, option: Option) -> Site:
    """The pairs (and, beyond them, dims) with the largest weights, the same for all heads."""
    site = attention(case)
    assert site.query.weight_CGD is not None and site.key.weight_CGD is not None and site.query.rotary is not None
    size, rank = site.query.rotary.size, option.integer("rank")
    strength = np.linalg.norm(site.query.weight_CGD, axis=(0, 1)) * np.linalg.norm(site.key.weight_CGD, axis=(0, 1))
    pairs = max(1, round(rank * size / site.qk_dim / 2))
    rest = rank - 2 * pairs
    best = np.argsort(-strength[pair_columns(size, False)].sum(axis=1))[:pairs]
    kept = kept_columns(best, size, False)
    others = size + np.argsort(-strength[size:])[:rest]
    parts = {}
    for name in ("query", "key"):
        part = getattr(site, name)
        columns = [*kept, *others]
        turn = replace(part.rotary, size=2 * pairs, keep=(kept,) * part.heads)
        bias = None if part.bias_GD is None else part.bias_GD[:, columns]
        parts[name] = replace(part, weight_CGD=part.weight_CGD[:, :, columns], bias_GD=bias, rotary=turn)
    return replace(site, **parts)


def rotated_apart(seed: int) -> Case:
    """Queries rotated, keys not."""
    case = attention_case(seed, rotary=True)
    site = attention(case)
    return Case(replace(site, key=replace(site.key, rotary=None)), case.values, case.valid_BS)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(2, 2, 16), (4, 2, 16), (3, 1, 24)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    biases=st.booleans(),
    rotary=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites(
    seed: int, shape: tuple[int, int, int], mask: str, biases: bool, rotary: bool, dtype: type
) -> None:
    heads, kv_heads, dim = shape
    case = attention_case(seed, heads, kv_heads, dim, 20, 8, 9, mask, rotary, biases=biases, dtype=dtype)
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
    full = PASS.apply(case.site, Option.of("low_rank_qk", case.site.id, rank=dim), facts)
    assert relative_error(full, case) < (1e-16 if dtype is np.float64 else 1e-6)
