"""Attention of odd graphs, run by TVM: with our kernels, and written out where they do not serve."""

from __future__ import annotations

import pytest

from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from tests.attention import test_scores_beyond as beyond
from tests.attention import test_scores_forms as forms
from tests.attention import test_scores_loops as loops
from tests.attention import test_scores_masks as masks
from tests.attention.written import feeds_of
from tests.runtimes.tvm.harness import assert_same

GRAPHS = {
    "heads in a loop": lambda: loops.looped("separate", "own"),
    "a scale per head": forms.scale_per_head,
    "groups apart": forms.groups_apart,
    "wide norm": forms.wide_norm,
    "keys hidden late": lambda: masks.attention(probabilities=masks.LATE["after a mask of the scores"]),
    "a sink": lambda: beyond.with_sink("sink"),
    "scores replaced": lambda: masks.graph("where, then padding of -1e4"),
    "scores replaced, capped": lambda: masks.graph("cap, then where, then padding"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_lowered_forms_run(name: str) -> None:
    graph = GRAPHS[name]()
    found = recognise(graph)
    # scores of rows without any key lie near -1e4, where float32 has three digits left: the reference is in float64
    assert_same(lower(graph, found.sites), feeds_of(graph, nobody=False), 1e-3)
