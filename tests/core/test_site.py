from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.core.memo import IdentityMemo
from rewriter.core.rewrite import output_weights, with_output_weights
from rewriter.core.site import AttentionSite, FeedForwardSite, Recognition
from tests.passes.reference import attention_case, feed_forward_case, output


def attention(**options: object) -> AttentionSite:
    site = attention_case(0, **options).site  # type: ignore[arg-type]
    assert isinstance(site, AttentionSite)
    return site


def test_keeping_all_heads_is_the_identity() -> None:
    for options in ({}, {"kv_heads": 2}, {"mask": "heads"}, {"kv_heads": 1, "rotary": True}):
        case = attention_case(0, **options)  # type: ignore[arg-type]
        assert isinstance(case.site, AttentionSite)
        kept = case.site.keep_heads(tuple(range(case.site.heads)))
        np.testing.assert_array_equal(output(kept, case.values), output(case.site, case.values))


def test_dropping_silent_heads_is_exact() -> None:
    for options in ({}, {"kv_heads": 2}, {"mask": "heads"}):
        case = attention_case(1, **options)  # type: ignore[arg-type]
        assert isinstance(case.site, AttentionSite) and case.site.output is not None
        weight = case.site.output.weight_HDC.copy()
        weight[1] = 0.0
        silent = replace(case.site, output=replace(case.site.output, weight_HDC=weight))
        kept = silent.keep_heads((0, 2, 3))
        np.testing.assert_allclose(output(kept, case.values), output(silent, case.values), rtol=1e-12, atol=1e-12)


def test_unread_key_heads_are_cut_unless_a_cache_shows_them() -> None:
    site = attention(kv_heads=2)
    assert site.keep_heads((0, 1)).key.heads == 1
    for cached in (replace(site.key, past="p"), replace(site.key, present="p")):
        kept = replace(site, key=cached).keep_heads((2, 3))
        assert kept.key.heads == 2 and kept.key.head_of == (1, 1)


def test_bias_selection_composes() -> None:
    site = attention(mask="heads")
    assert site.keep_heads((1, 2, 3)).keep_heads((0, 2)).bias.keep == (1, 3)


def test_plainness() -> None:
    site = attention()
    assert site.key.plain and site.mapped and not site.cached
    assert not replace(site.key, present="p").plain and not attention(rotary=True).key.plain
    assert not attention(norm=True).query.plain and not replace(site.key, weight_CGD=None).mapped


def test_keep_units() -> None:
    case = feed_forward_case(0, gated=True)
    assert isinstance(case.site, FeedForwardSite)
    down = case.site.down_FC.copy()
    down[10:] = 0.0
    silent = replace(case.site, down_FC=down)
    kept = silent.keep_units(tuple(range(10)))
    assert kept.width == 10 and kept.gate_CF is not None and kept.gate_CF.shape[1] == 10
    np.testing.assert_allclose(output(kept, case.values), output(silent, case.values), rtol=1e-12, atol=1e-12)


def test_output_weights_round_trip() -> None:
    for site in (attention(), attention(biases=False), feed_forward_case(0).site):
        weights = output_weights(site)
        np.testing.assert_array_equal(output_weights(with_output_weights(site, weights + 1.0)), weights + 1.0)


def test_sites_come_in_order_of_data_flow() -> None:
    first, second = replace(attention(), order=3), feed_forward_case(0).site
    assert isinstance(second, FeedForwardSite)
    assert Recognition((first,), (replace(second, order=1),)).sites[0].id == second.id


def test_memo_lives_as_long_as_its_keys() -> None:
    memo: IdentityMemo[int] = IdentityMemo()
    calls: list[int] = []
    key, other = attention(), attention()

    def compute() -> int:
        calls.append(1)
        return len(calls)

    assert (memo.get((key,), compute), memo.get((key,), compute), memo.get((other,), compute)) == (1, 1, 2)
    del key
    assert len(memo._entries) == 1
