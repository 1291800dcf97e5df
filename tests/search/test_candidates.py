from __future__ import annotations

import pytest

from rewriter.core.option import Option
from rewriter.search.candidates import thin


@pytest.mark.parametrize(("length", "count"), [(11, 3), (11, 1), (4, 3), (3, 3), (24, 10), (2, 6)])
def test_thinning_keeps_order_and_count(length: int, count: int) -> None:
    levels = [Option.of("head_pruning", keep=length - i) for i in range(length)]
    kept = thin(levels, count)
    assert len(kept) == min(length, count)
    assert [levels.index(option) for option in kept] == sorted({levels.index(option) for option in kept})


def test_a_long_ladder_is_tried_where_it_helps() -> None:
    levels = [Option.of("head_pruning", keep=keep) for keep in range(11, 0, -1)]
    assert [option["keep"] for option in thin(levels, 3)] == [10, 7, 5]
