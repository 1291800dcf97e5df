from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from passes.kv_merge import KvMerge
from rewriter.core.merging import equal_groups, merge_keys, merge_values
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, Projection, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, relative_error, statistics

PASS = KvMerge()


def attention(case: Case) -> AttentionSite:
    assert isinstance(case.site, AttentionSite)
    return case.site


def twins(case: Case, kind: str) -> Case:
    """Key/value heads 1, 3, ... are heads 0, 2, ... in another basis (in another phase, if rotated)."""
    site, rng = attention(case), np.random.default_rng(5)
    query, key, value = (np.array(p.weight_CGD) for p in (site.query, site.key, site.value))
    biases = {name: np.array(getattr(site, name).bias_GD) for name in ("query", "key", "value")}
    output = np.array(site.output.weight_HDC) if site.output else np.zeros(0)
    for one in range(1, site.key.heads, 2):
        turn = phases(site.qk_dim, rng) if kind == "phase" else ortho_group.rvs(site.qk_dim, random_state=rng)
        other = ortho_group.rvs(site.v_dim, random_state=rng)
        key[:, one], biases["key"][one] = key[:, one - 1] @ turn, biases["key"][one - 1] @ turn
        value[:, one], biases["value"][one] = value[:, one - 1] @ other, biases["value"][one - 1] @ other
    parts = {
        name: replace(getattr(site, name), weight_CGD=weight, bias_GD=biases[name])
        for name, weight in (("query", query), ("key", key), ("value", value))
    }
    assert site.output is not None
    return Case(replace(site, output=replace(site.output, weight_HDC=output), **parts), case.values, case.valid_BS)


def phases(dim: int, rng: np.random.Generator) -> np.ndarray:
    """One rotation per frequency, halves apart."""
    angle, half = rng.uniform(0, 2 * np.pi, dim // 2), dim // 2
    turn = np.zeros((dim, dim))
    index = np.arange(half)
    turn[index, index] = turn[index + half, index + half] = np.cos(angle)
    turn[index + half, index], turn[index, index + half] = np.sin(angle), -np.sin(angle)
    return turn


class TestKvMerge(CalibratedContract):
    name = "kv_merge"

    def cases(self) -> list[Case]:
        return [
            attention_case(0, heads=4, kv_heads=4, dim=8, batch=20),
            attention_case(1, heads=8, kv_heads=4, dim=6, batch=20, mask="causal", rotary=True),
            attention_case(2, heads=6, kv_heads=6, dim=4, batch=20, mask="heads", biases=False),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention(attention_case(0))
        turned = attention(attention_case(0, rotary=True))
        assert turned.key.rotary is not None
        dropped = replace(turned.key.rotary, keep=((0, 1),) * 4)
        wide = np.zeros((4, 64, 128), np.float32)
        return {
            "one-head": attention_case(0, kv_heads=1).site,
            "shared-query-heads": replace(site, query=replace(site.query, head_of=(0, 0, 1, 1))),
            "uneven-groups": replace(site, value=replace(site.value, head_of=(0, 1, 3, 2))),
            "head-norm": attention_case(0, norm=True).site,
            "rotated-apart": replace(site, query=turned.query),
            "pairs-dropped": replace(turned, key=replace(turned.key, rotary=dropped)),
            "too-large": replace(
                site,
                heads=64,
                query=Projection("x", wide, head_of=tuple(range(64))),
                key=Projection("x", wide, head_of=tuple(range(64))),
                value=Projection("x", wide, head_of=tuple(range(64))),
            ),
            "cache-in-signature": replace(site, key=replace(site.key, present="present.0.key")),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, groups=attention(case).key.heads)

    def naive(self, case: Case, option: Option) -> Site:
        """The mean of neighbouring heads (Ainslie et al. 2023), without training."""
        site, groups = attention(case), option.integer("groups")
        size = site.key.heads // groups

        def pooled(part: Projection) -> Projection:
            weight = np.asarray(part.weight_CGD)
            mean = weight.reshape(len(weight), groups, size, -1).mean(axis=2)
            bias = None if part.bias_GD is None else part.bias_GD.reshape(groups, size, -1).mean(axis=1)
            return replace(part, weight_CGD=mean, bias_GD=bias, head_of=tuple(head // size for head in part.head_of))

        return replace(site, key=pooled(site.key), value=pooled(site.value))

    @pytest.mark.parametrize("kind", ["basis", "phase"])
    def test_heads_in_another_basis_merge_for_free(self, kind: str) -> None:
        plain = attention_case(3, heads=8, kv_heads=4, dim=8, batch=20, mask="causal", rotary=kind == "phase")
        case = twins(plain, kind)
        merged = PASS.apply(case.site, Option.of(self.name, case.site.id, groups=2), statistics(case.site, case))
        assert isinstance(merged, AttentionSite) and merged.key.heads == merged.value.heads == 2
        assert relative_error(merged, case) < 1e-8
        assert relative_error(self.naive(case, Option.of(self.name, case.site.id, groups=2)), case) > 1e-2

    def test_a_refused_norm_would_change_the_output(self) -> None:
        case = attention_case(4, norm=True)
        site = attention(case)
        bare = replace(site, query=replace(site.query, norm=None), key=replace(site.key, norm=None))
        inner = Case(bare, case.values, case.valid_BS)
        merged = PASS.apply(bare, Option.of(self.name, site.id, groups=2), statistics(bare, inner))
        assert isinstance(merged, AttentionSite)
        wrong = replace(
            merged,
            query=replace(merged.query, norm=site.query.norm),
            key=replace(merged.key, norm=site.key.norm),
        )
        assert relative_error(wrong, case) > 1e-2


def test_keys_beat_alignment_by_procrustes() -> None:
    """The squared error of pooled scores, against turning the second head onto the first and taking the mean."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    turn = ortho_group.rvs(6, random_state=rng)
    keys = np.stack([first, first @ turn + 0.3 * rng.normal(size=first.shape)])
    queries = rng.normal(size=(2, 300, 6)) @ rng.normal(size=(2, 6, 6))
    joint = np.concatenate(list(keys), axis=1)
    merged = merge_keys(queries.transpose(0, 2, 1) @ queries, joint.T @ joint)
    shared = sum(keys[m] @ merged.key_MDD[m] for m in range(2))
    left, _, right = np.linalg.svd(keys[1].T @ keys[0])
    mean = (keys[0] + keys[1] @ left @ right) / 2
    readers = [queries[0], queries[1] @ left @ right]
    wanted = [queries[m] @ keys[m].T for m in range(2)]
    ours = sum(np.sum((queries[m] @ merged.query_MDD[m] @ shared.T - wanted[m]) ** 2) for m in range(2))
    theirs = sum(np.sum((readers[m] @ mean.T - wanted[m]) ** 2) for m in range(2))
    assert ours < theirs
    np.testing.assert_allclose(ours / sum(np.sum(w**2) for w in wanted), merged.lost, rtol=1e-6)


def test_sweeps_only_help_and_the_loss_is_the_truth() -> None:
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(4, 200, 12)) @ rng.normal(size=(12, 12))
    weight, members = rng.normal(size=(4, 6, 10)), [0, 0, 1, 1]
    grams = mixed.transpose(0, 2, 1) @ mixed
    found = [merge_values(grams, weight, members, sweeps=sweeps) for sweeps in (0, 2, 6)]
    assert found[0].lost >= found[1].lost >= found[2].lost > 0.0
    wanted = [mixed[h][:, 6 * m : 6 * m + 6] @ weight[h] for h, m in enumerate(members)]
    error = sum(np.sum((mixed[h] @ found[2].map_KD @ found[2].weight_HDC[h] - wanted[h]) ** 2) for h in range(4))
    np.testing.assert_allclose(error / sum(np.sum(w**2) for w in wanted), found[2].lost, rtol=1e-6)


def test_groups_are_equal_and_near() -> None:
    place = np.array([0.0, 5.0, 0.1, 5.2, 9.0, 9.1])
    assert equal_groups(np.abs(place[:, None] - place[None]), 3) == ((0, 2), (1, 3), (4, 5))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 4, 4), (4, 2, 6), (6, 6, 2), (8, 4, 4)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    rotary=st.booleans(),
    biases=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites(
    seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool, dtype: type
) -> None:
    heads, kv_heads, dim = shape
    case = attention_case(seed, heads, kv_heads, dim, 16, 8, 9, mask, rotary, biases=biases, dtype=dtype)
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
