"""What is streamed from a graph's values against the definitions, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rewriter.calibration.details import Details, Inner
from rewriter.core.site import AttentionSite
from rewriter.core.statistics import AttentionStatistics, Detail
from tests.passes.reference import Case, attention_case, operand, statistics

WANTED: frozenset[Detail] = frozenset({"heads", "products", "joint_keys", "mixed", "distance"})


def batches(case: Case, size: int) -> list[Inner]:
    site = case.site
    assert isinstance(site, AttentionSite)
    query, key, value = (
        torch.from_numpy(operand(part, case.values).transpose(0, 2, 1, 3))
        for part in (site.query, site.key, site.value)
    )
    query = query[:, :, list(site.query.head_of)]
    bias = torch.from_numpy(np.array(case.values["mask"])) if "mask" in case.values else None
    valid = torch.from_numpy(case.valid_BS)
    found = []
    for start in range(0, len(valid), size):
        part = slice(start, start + size)
        own = bias if bias is None or bias.shape[0] == 1 else bias[part]
        found.append(Inner(query[part], key[part], value[part], own, valid[part], valid[part]))
    return found


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("mask", ["padding", "bool", "causal", "heads"])
def test_any_batching_gives_the_one_shot_sums(mask: str, size: int) -> None:
    case = attention_case(0, heads=4, kv_heads=2, mask=mask, rotary=True, softcap=3.0)
    assert isinstance(case.site, AttentionSite)
    details = Details(case.site, WANTED)
    for inner in batches(case, size):
        details.add(inner)
    expected = statistics(case.site, case)
    assert isinstance(expected, AttentionStatistics)
    for name, found in details.fields().items():
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_padding_does_not_matter() -> None:
    case = attention_case(1, mask="bool")
    assert isinstance(case.site, AttentionSite)
    values = {**case.values, "x": np.where(case.valid_BS[:, :, None], case.values["x"], 1e3)}
    found = []
    for one in (case, Case(case.site, values, case.valid_BS)):
        details = Details(case.site, WANTED)
        for inner in batches(one, 4):
            details.add(inner)
        found.append(details.fields())
    for name, array in found[0].items():
        np.testing.assert_allclose(found[1][name], array, rtol=1e-9, atol=1e-9)


def test_only_what_is_wanted() -> None:
    case = attention_case(2)
    assert isinstance(case.site, AttentionSite)
    details = Details(case.site, ())
    for inner in batches(case, 6):
        details.add(inner)
    fields = details.fields()
    assert set(fields) == {"query_HDD", "key_GDD"} and all(array.size == 0 for array in fields.values())
