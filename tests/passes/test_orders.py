"""Passes compose on the raised site: any order of any of them on any site stays legal, and exact at full size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from tests.passes.contract import assert_legal
from tests.passes.reference import TARGET, Case, attention_case, feed_forward_case, relative_error, statistics

PASSES = discover()
CALIBRATED = ("attention_replacement", "head_pruning", "kv_merge", "local_window", "low_rank_qk", "low_rank_vo")
EXACT = ("exact_cleanup", "qkv_packing")
WIDE = replace(TARGET, features=("avx512_vnni", "avx512_bf16"))


def full(name: str, site: Site) -> Option | None:
    """The option that cuts nothing."""
    if not isinstance(site, AttentionSite):
        return None
    levels = {
        "head_pruning": {"keep": site.heads},
        "kv_merge": {"groups": site.key.heads},
        "local_window": {"size": 64, "sinks": 4},
        "low_rank_qk": {"rank": site.qk_dim},
        "low_rank_vo": {"rank": site.v_dim},
    }
    return Option.of(name, site.id, **levels[name]) if name in levels else None


def drawn(seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool, dtype: type) -> Case:
    heads, kv_heads, dim = shape
    case = attention_case(seed, heads, kv_heads, dim, 24, 8, 9, mask, rotary, biases=biases, dtype=dtype)
    assert isinstance(case.site, AttentionSite)
    return Case(replace(case.site, mask="padding", example_shape=(2, 512, 512)), case.values, case.valid_BS)


SITES = {
    "seed": st.integers(0, 10_000),
    "shape": st.sampled_from([(4, 4, 16), (4, 2, 16), (6, 3, 8), (4, 1, 8)]),
    "mask": st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    "rotary": st.booleans(),
    "biases": st.booleans(),
}


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(CALIBRATED + EXACT), dtype=st.sampled_from([np.float32, np.float64]), **SITES)
def test_any_order_stays_legal(
    order: list[str], seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool, dtype: type
) -> None:
    case = drawn(seed, shape, mask, rotary, biases, dtype)
    site = case.site
    for name in [*order, "precision"]:
        one = PASSES[name]
        offered = one.options(site, WIDE)
        if not offered or one.refuse(site) is not None:
            continue
        facts = statistics(site, case) if one.kind == "calibrated" else None
        site = one.apply(site, offered[len(offered) // 2], facts)
        assert_legal(site, case)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(CALIBRATED[1:] + EXACT), **SITES)
def test_full_sizes_in_any_order_change_nothing(
    order: list[str], seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, biases: bool
) -> None:
    case = drawn(seed, shape, mask, rotary, biases, np.float64)
    site = case.site
    for name in order:
        one = PASSES[name]
        if one.refuse(site) is not None:
            continue
        option = full(name, site) or one.options(site, TARGET)[0]
        site = one.apply(site, option, statistics(site, case) if one.kind == "calibrated" else None)
    assert relative_error(site, case) < 1e-12


def test_every_pass_refuses_with_a_reason_or_offers_options_that_apply() -> None:
    cases = [drawn(0, (4, 2, 16), "bool", False, True, np.float32), feed_forward_case(0, dtype=np.float32)]
    for case in cases:
        assert isinstance(case.site, AttentionSite | FeedForwardSite)
        for name, one in PASSES.items():
            refusal, offered = one.refuse(case.site), one.options(case.site, WIDE)
            assert (refusal is None) == bool(offered), name
            assert refusal is None or (refusal.code and len(refusal.why) > 10)
            try:
                one.apply(case.site, Option.of(name, case.site.id, nonsense="x"), statistics(case.site, case))
            except OptionError as problem:
                assert problem.hint
            else:
                assert name == "exact_cleanup"
