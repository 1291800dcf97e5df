"""A form that a runtime computes otherwise is found out before it is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rewriter.attention.lower import fragment, lower
from rewriter.core.forms import DECOMPOSED
from rewriter.runtimes.workers import Worker
from rewriter.search.form_check import check_forms, hostile_values, one_copy, reads_of
from rewriter.search.session import ONNXRUNTIME
from tests.assembly.tiny import model


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_forms_agree_and_a_wrong_one_does_not(name: str, tmp_path: Path) -> None:
    graph, found = model(name)
    plain = replace(found.attention[0], forms=(DECOMPOSED,))
    batches = hostile_values(graph, lower(graph, found.attention), reads_of([fragment(graph, plain)]), 0)
    assert len(batches) == 3
    wrong = replace(plain, scale=2.0 * plain.scale)
    forms = [plain, *(replace(plain, forms=(form,)) for form in ("multi_head_attention", "attention")), wrong]
    pieces = [one_copy(graph, site, batches) for site in forms]
    with Worker("forms", 1) as worker:
        answers = check_forms(pieces, batches, worker, ONNXRUNTIME, tmp_path)
    assert answers[0] is None
    assert answers[2] is not None and "kernel differs" in answers[2].why
