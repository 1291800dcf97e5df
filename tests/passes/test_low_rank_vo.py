from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.low_rank_vo import LowRankVO
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, features, relative_error, statistics

PASS = LowRankVO()


def attention(case: Case) -> AttentionSite:
    assert isinstance(case.site, AttentionSite)
    return case.site


class TestLowRankVO(CalibratedContract):
    name = "low_rank_vo"

    def cases(self) -> list[Case]:
        return [
            attention_case(0, heads=3, kv_heads=3, dim=32, width=40, batch=24),
            attention_case(1, heads=4, kv_heads=2, dim=24, width=40, batch=24, mask="bool"),
            attention_case(2, heads=2, kv_heads=2, dim=16, width=24, batch=24, rotary=True, biases=False),
            attention_case(3, heads=2, kv_heads=1, dim=16, width=40, batch=24, softcap=2.0),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention(attention_case(0))
        normed = attention(attention_case(0, norm=True))
        return {
            "value-not-plain": replace(site, value=replace(site.value, norm=normed.key.norm)),
            "cache-in-signature": replace(site, value=replace(site.value, present="present.0.value")),
            "value-escapes": replace(site, escapes=("values",)),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, rank=attention(case).v_dim)

    def naive(self, case: Case, option: Option) -> Site:
        """Truncated SVD of W_v [W_o of the group] per value head, no data, no refit."""
        site, rank = attention(case), option.integer("rank")
        assert site.value.weight_CGD is not None and site.output is not None
        weight_CGR = np.empty((*site.value.weight_CGD.shape[:2], rank))
        bias_GR = None if site.value.bias_GD is None else np.empty((site.value.heads, rank))
        weight_HRC = np.empty((site.heads, rank, site.output.weight_HDC.shape[2]))
        for group in range(site.value.heads):
            members = [head for head in range(site.heads) if site.value.head_of[head] == group]
            joined = np.concatenate([site.output.weight_HDC[head] for head in members], axis=1)
            root = np.linalg.qr(site.value.weight_CGD[:, group], mode="r")
            left = np.linalg.svd(root @ joined, full_matrices=False)[0][:, :rank]
            basis, inverse = np.linalg.solve(root, left), left.T @ root
            weight_CGR[:, group] = site.value.weight_CGD[:, group] @ basis
            if bias_GR is not None and site.value.bias_GD is not None:
                bias_GR[group] = site.value.bias_GD[group] @ basis
            for head in members:
                weight_HRC[head] = inverse @ site.output.weight_HDC[head]
        value = replace(site.value, weight_CGD=weight_CGR, bias_GD=bias_GR)
        return replace(site, value=value, output=replace(site.output, weight_HDC=weight_HRC))

    def test_single_head_is_the_truncated_svd_of_its_centred_contribution(self) -> None:
        case = attention_case(4, heads=1, kv_heads=1, dim=16, width=40, batch=30)
        site, rank = attention(case), 8
        changed = PASS.apply(site, Option.of(self.name, site.id, rank=rank), statistics(site, case))
        assert site.output is not None
        rows = features(site, case.values)[case.valid_BS]
        product = (rows - rows.mean(axis=0)) @ site.output.weight_HDC[0]
        values = np.linalg.svd(product, compute_uv=False)
        best = np.sum(values[rank:] ** 2) / np.sum(values**2)
        np.testing.assert_allclose(relative_error(changed, case), best, rtol=1e-4)

    def test_refit_is_joint_over_heads(self) -> None:
        case = self.cases()[0]
        site = attention(case)
        facts = statistics(site, case)
        option = Option.of(self.name, site.id, rank=8)
        joint = PASS.apply(site, option, facts)
        weights = PASS._bases_of(site, facts)  # type: ignore[arg-type]
        assert isinstance(joint, AttentionSite) and joint.output is not None and site.output is not None
        inverse = weights.inverse_GDD[list(site.value.head_of), :8]
        apart = replace(joint, output=replace(site.output, weight_HDC=inverse @ site.output.weight_HDC))
        assert relative_error(joint, case) < 0.98 * relative_error(apart, case)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(2, 2, 16), (4, 2, 16), (3, 1, 24)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    rotary=st.booleans(),
    norm=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites(seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, norm: bool, dtype: type) -> None:
    heads, kv_heads, dim = shape
    case = attention_case(seed, heads, kv_heads, dim, 20, 8, 9, mask, rotary, norm, dtype=dtype)
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
    full = PASS.apply(case.site, Option.of("low_rank_vo", case.site.id, rank=dim), facts)
    assert relative_error(full, case) < (1e-16 if dtype is np.float64 else 1e-6)
