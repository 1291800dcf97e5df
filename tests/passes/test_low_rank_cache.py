from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from passes.low_rank_cache import LowRankCache
from rewriter.core.cached_keys import key_maps, key_parts, split_of
from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, output_weights
from rewriter.core.site import AttentionSite, Projection, Site
from rewriter.core.statistics import AttentionStatistics, Regression
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import (
    TARGET,
    Case,
    attention_case,
    centred_keys,
    features,
    operand,
    output,
    relative_error,
    statistics,
)
from tests.passes.test_low_rank_qk import partly_rotated

PASS = LowRankCache(allowed=True)


def attention(case: Case) -> AttentionSite:
    assert isinstance(case.site, AttentionSite)
    return case.site


def cached(case: Case) -> Case:
    """The same attention with its keys and values as outputs, as in a prefill graph."""
    site = attention(case)
    key, value = replace(site.key, present="present.0.key"), replace(site.value, present="present.0.value")
    return Case(replace(site, key=key, value=value), case.values, case.valid_BS)


def without_data(site: AttentionSite) -> AttentionStatistics:
    """Statistics as if the layer's input were white noise: what is found then is a plain SVD of weights."""
    query, key, value = (np.asarray(p.weight_CGD, np.float64) for p in (site.query, site.key, site.value))
    flat_k, flat_v = key.reshape(len(key), -1), value.reshape(len(value), -1)
    own = [value[:, group] for group in site.value.head_of]
    gram = linalg.block_diag(*(one.T @ one for one in own), 1.0)
    weights = output_weights(site)
    return AttentionStatistics(
        np.stack([query[:, site.query.head_of[h]].T @ query[:, site.query.head_of[h]] for h in range(site.heads)]),
        np.einsum("cgd,cge->gde", key, key),
        Regression(gram, gram @ weights, float(np.sum(weights * (gram @ weights))), len(gram)),
        joint_key=flat_k.T @ flat_k,
        mixed_HKK=np.broadcast_to(flat_v.T @ flat_v, (site.heads, flat_v.shape[1], flat_v.shape[1])),
    )


class TestLowRankCache(CalibratedContract):
    name = "low_rank_cache"

    @property
    def subject(self) -> Pass:
        return PASS

    def cases(self) -> list[Case]:
        drawn = (
            attention_case(0, heads=4, kv_heads=4, dim=16, width=40, batch=20, mask="causal"),
            attention_case(1, heads=4, kv_heads=2, dim=16, width=40, batch=20, mask="bool", rotary=True),
            attention_case(2, heads=6, kv_heads=3, dim=16, width=40, batch=20, mask="heads", biases=False),
            partly_rotated(attention_case(3, 4, 2, dim=16, width=40, batch=20, mask="causal", rotary=True), 8, True),
        )
        return [cached(case) for case in drawn]

    def refused(self) -> dict[str, Site]:
        site = attention(cached(attention_case(0)))
        placed = replace(site.key, places="places")
        problem = Refusal("cache-computed", "what was cached is cut from a longer cache")
        normed = attention(cached(attention_case(0, norm=True)))
        return {
            "no-cache": attention_case(0).site,
            "shared-buffer": replace(site, key=placed),
            "cache-computed": replace(site, problems=(problem,)),
            "cross-cache": replace(site, cross=True),
            "head-norm": replace(normed, value=replace(normed.value, norm=normed.key.norm)),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, key=attention(case).qk_dim, value=attention(case).v_dim)

    def naive(self, case: Case, option: Option) -> Site:
        """The same sizes by a plain SVD of the weights; of merged heads the mean (Ainslie et al. 2023)."""
        site = attention(case)
        if "heads" in dict(option.parameters):
            return pooled(site, option.integer("heads"))
        return PASS.apply(site, option, without_data(site))

    def test_every_form_is_exact_at_full_size(self) -> None:
        for case in self.cases():
            site = attention(case)
            for form in forms(site):
                after = PASS.apply(site, Option.of(self.name, site.id, **form), self.facts(case))
                assert relative_error(after, case) < 1e-16, form

    def test_a_cache_of_the_original_becomes_one_of_the_rewritten(self) -> None:
        """`cache_map` makes of old keys and values what the rewritten projections make of the same tokens."""
        for case in self.cases():
            facts = self.facts(case)
            for option in PASS.options(case.site, TARGET):
                after = PASS.apply(case.site, option, facts)
                assert isinstance(after, AttentionSite)
                for old, new in zip(
                    (attention(case).key, attention(case).value), (after.key, after.value), strict=True
                ):
                    if new.cache_map is None:
                        assert old is new
                        continue
                    made = np.einsum("bgsd,gdhe->bhse", operand(old, case.values), new.cache_map)
                    np.testing.assert_allclose(made, operand(new, case.values), atol=1e-9)

    def test_latents_beat_ranks_of_the_same_size(self) -> None:
        """What heads have in common is cached once."""
        for case in self.cases():
            site, facts = attention(case), self.facts(case)
            for rank in (4, 8):
                own = Option.of(self.name, site.id, value=rank)
                shared = Option.of(self.name, site.id, value_latent=rank * site.value.heads)
                errors = [relative_error(PASS.apply(site, one, facts), case) for one in (own, shared)]
                assert errors[1] <= errors[0] * 1.05 + 1e-9

    def test_refusal_without_permission_names_the_flag(self) -> None:
        refusal = discover()[self.name].refuse(self.cases()[0].site)
        assert refusal is not None and refusal.code == "cache-change-not-allowed"
        assert "--allow-cache-change" in refusal.why
        assert discover()[self.name].permitted().refuse(self.cases()[0].site) is None

    def test_keys_with_a_norm_keep_their_size_and_values_may_shrink(self) -> None:
        case = cached(attention_case(0, dim=16, norm=True))
        offered = PASS.options(case.site, TARGET)
        assert offered and all({key for key, _ in one.parameters} <= {"value", "value_latent"} for one in offered)
        for form in ({"key": 8}, {"key_latent": 32}, {"heads": 2}):
            self.assert_rejected(case, Option.of(self.name, case.site.id, **form))

    def test_parameters_that_do_not_go_together(self) -> None:
        for form in ({}, {"heads": 2, "key": 8}, {"key": 8, "key_latent": 16}, {"rank": 8}, {"heads": 3}):
            self.assert_rejected(self.cases()[0], Option.of(self.name, self.cases()[0].site.id, **form))
        turned = self.cases()[1]
        self.assert_rejected(turned, Option.of(self.name, turned.site.id, key=7))

    def test_statistics_of_all_heads_are_asked_for_only_where_they_are_read(self) -> None:
        needs = {form: PASS.needs(Option.of(self.name, **{form: 8})) for form in ("key", "value", "value_latent")}
        assert needs == {"key": {"heads"}, "value": frozenset(), "value_latent": {"mixed"}}

    def test_refusals_have_counter_examples(self) -> None:
        """Keys mixed as if there were no norm, cap or sink change the output of an attention that has one."""
        for changes in ({"norm": True}, {"softcap": 1.0}):
            case = cached(attention_case(4, dim=16, **changes))  # type: ignore[arg-type]
            site = attention(case)
            bare = replace(site, softcap=0.0, query=replace(site.query, norm=None), key=replace(site.key, norm=None))
            inner = Case(bare, case.values, case.valid_BS)
            made = PASS.apply(bare, Option.of(self.name, site.id, key_latent=64), statistics(bare, inner))
            assert isinstance(made, AttentionSite) and relative_error(made, inner) < 1e-16
            if "norm" in changes:
                gain = np.ones(64)
                norms = [replace(part.norm, gain_D=gain) for part in (site.query, site.key) if part.norm]
                made = replace(made, query=replace(made.query, norm=norms[0]), key=replace(made.key, norm=norms[1]))
                assert relative_error(made, case) > 1e-3
            else:
                # a cut that softmax hardly sees moves all scores of a row, which a cap does see
                cut = PASS.apply(bare, Option.of(self.name, site.id, key=8), statistics(bare, inner))
                assert isinstance(cut, AttentionSite)
                capped = relative_error(replace(cut, softcap=1.0), case)
                assert capped > 1e-5


def forms(site: AttentionSite) -> list[dict[str, int]]:
    """Every form at full size."""
    return [
        {"heads": site.key.heads},
        {"key": site.qk_dim, "value": site.v_dim},
        {"key": site.qk_dim},
        {"value": site.v_dim},
        {"key_latent": site.key.heads * site.qk_dim},
        {"value_latent": site.value.heads * site.v_dim},
    ]


def pooled(site: AttentionSite, groups: int) -> AttentionSite:
    size = site.key.heads // groups

    def one(part: Projection) -> Projection:
        weight = np.asarray(part.weight_CGD)
        mean = weight.reshape(len(weight), groups, size, -1).mean(axis=2)
        bias = None if part.bias_GD is None else part.bias_GD.reshape(groups, size, -1).mean(axis=1)
        return replace(part, weight_CGD=mean, bias_GD=bias, head_of=tuple(head // size for head in part.head_of))

    return replace(site, key=one(site.key), value=one(site.value))


@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_of_one_head_give_the_whitened_optimum(interleaved: bool) -> None:
    """What is lost of the centred scores is what the parts left out carry, where nothing turns."""
    case = attention_case(5, heads=2, kv_heads=2, dim=16, width=30, mask="none")
    site, facts = attention(case), statistics(case.site, case)
    assert isinstance(facts, AttentionStatistics)
    query, key = operand(site.query, case.values)[:, 0][case.valid_BS], centred_keys(site, case)[0]
    parts = key_parts(facts.query_HDD[:1], facts.key_GDD[0], 0, interleaved)
    split = split_of([parts], 6)
    assert split == (0, 6)
    left, right, _ = key_maps(parts, *split, 0, interleaved)
    lost = np.linalg.norm(query @ key.T - (query @ left[0]) @ (key @ right[0]).T) ** 2
    values = np.linalg.svd(np.linalg.qr(query, mode="r") @ np.linalg.qr(key, mode="r").T)[1]
    np.testing.assert_allclose(lost, np.sum(values[6:] ** 2), rtol=1e-5)
    np.testing.assert_allclose(parts.lost(*split), lost, rtol=1e-5)


SITES = {
    "seed": st.integers(0, 10_000),
    "shape": st.sampled_from([(4, 4, 8), (4, 2, 8), (6, 3, 4), (4, 1, 8)]),
    "mask": st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    "rotary": st.booleans(),
    "biases": st.booleans(),
    "dtype": st.sampled_from([np.float32, np.float64]),
    "form": st.sampled_from(["heads", "key", "value", "key_latent", "value_latent"]),
    "share": st.sampled_from([1, 2, 4]),
}


@settings(max_examples=30, deadline=None)
@given(**SITES)
def test_any_form_on_any_site_is_legal_and_exact_at_full_size(
    seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool, dtype: type, form: str, share: int
) -> None:
    heads, kv_heads, dim = shape
    case = cached(attention_case(seed, heads, kv_heads, dim, 24, 8, 9, mask, rotary, biases=biases, dtype=dtype))
    site = attention(case)
    width = {"heads": kv_heads, "key": dim, "value": dim}.get(form, kv_heads * dim)
    option = Option.of(PASS.name, site.id, **{form: width // share if width >= share else 1})
    try:
        after = PASS.apply(site, option, statistics(site, case))
    except OptionError:
        assert rotary or form == "heads"
        return
    assert_legal(after, case)
    if share == 1:
        before, found = output(site, case.values), output(after, case.values)
        close = 1e-9 if dtype is np.float64 else 2e-4
        np.testing.assert_allclose(found[case.valid_BS], before[case.valid_BS], rtol=close, atol=close)
    assert features(after, case.values).shape[-1] == after.heads * after.v_dim  # type: ignore[union-attr]
