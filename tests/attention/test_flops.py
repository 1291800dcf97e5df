from __future__ import annotations

import pytest

from rewriter.attention.flops import core_flops, cost, total
from tests.attention import exported


def test_heads_are_not_counted_twice() -> None:
    # batch 1, 64 tokens, width 512 in 8 heads: Q K^T and P V are 2 * 2 * 64^2 * 512, whatever the number of heads
    assert core_flops(1, 64, 64, heads=8, qk_dim=64, v_dim=64) == 2 * 2 * 64**2 * 512 == 8_388_608
    assert core_flops(1, 64, 64, heads=1, qk_dim=512, v_dim=512) == 8_388_608


def test_parts_of_a_block() -> None:
    found = exported.recognised(exported.bert("eager"))
    attention = cost(found.attention[0], 2, 10)
    assert attention.core_flops == 2 * 2 * 2 * 10 * 10 * 24
    assert attention.flops == attention.core_flops + 2 * 2 * 10 * 4 * 24 * 24
    assert attention.parameters >= 4 * 24 * 24
    feed_forward = cost(found.feed_forward[0], 2, 10)
    assert feed_forward.flops == 2 * 2 * 10 * 2 * 24 * 40
    everything = total(found.sites, 2, 10)
    assert everything.flops == 2 * (attention.flops + feed_forward.flops)


@pytest.mark.parametrize(("keys", "factor"), [(10, 1), (20, 2)])
def test_cross_attention_counts_its_own_keys(keys: int, factor: int) -> None:
    site = exported.recognised(exported.bert("eager")).attention[0]
    assert cost(site, 1, 10, keys).core_flops == factor * cost(site, 1, 10).core_flops
