from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewriter.core.option import Option
from rewriter.search.candidates import candidates, thin
from rewriter.search.selection import PRECISION, select_passes
from tests.passes import reference

TARGET = replace(reference.TARGET, features=("avx512_vnni", "avx512_bf16"))


@pytest.mark.parametrize(("length", "count"), [(11, 3), (11, 1), (4, 3), (3, 3), (24, 10), (2, 6)])
def test_thinning_keeps_order_and_count(length: int, count: int) -> None:
    levels = [Option.of("head_pruning", keep=length - i) for i in range(length)]
    kept = thin(levels, count)
    assert len(kept) == min(length, count)
    assert [levels.index(option) for option in kept] == sorted({levels.index(option) for option in kept})


def test_cuts_are_combined_on_top_of_a_number_format() -> None:
    selection = select_passes(None, "any", TARGET)
    site = reference.attention_case(0, dim=32, dtype=np.float32).site
    found = candidates(site, selection, TARGET, "normal")
    assert found[0] == ()
    assert len(set(found)) == len(found)
    rounded = [c for c in found if c and c[-1].name == PRECISION]
    assert {c[-1]["dtype"] for c in rounded} == {"int8"}
    assert max(map(len, found)) == 4
    assert all(len(c) <= 1 for c in found if c not in rounded)
    without = candidates(site, select_passes(None, "fp32", TARGET), TARGET, "normal")
    assert max(map(len, without)) == 3


def test_a_long_ladder_is_tried_where_it_helps() -> None:
    levels = [Option.of("head_pruning", keep=keep) for keep in range(11, 0, -1)]
    assert [option["keep"] for option in thin(levels, 3)] == [10, 7, 5]
