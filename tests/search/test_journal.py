"""What a search remembers: the same question costs nothing, another one is another question."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rewriter.accuracy.paired import Paired
from rewriter.assembly.assemble import assemble
from rewriter.core.option import Option, Plan
from rewriter.core.passes_registry import discover
from rewriter.core.site import Site
from rewriter.search import journal as module
from rewriter.search.journal import Journal
from tests.assembly.tiny import feeds, model, uniform

NARROW, WIDE = ((Option.of("ffn_pruning", "layers.0.feed_forward", width=width),) for width in (8, 16))


def journal(folder: Path, **subject: str) -> Journal:
    return Journal(folder, model("bert")[0], {"data": "some", **subject})


def never(*_: object) -> float:
    pytest.fail("computed again")


def test_numbers_are_computed_once_per_question_and_subject(tmp_path: Path) -> None:
    first = journal(tmp_path)
    assert first.number({"damage": "a"}, lambda: 0.25) == 0.25 and first.hits == 0
    again = journal(tmp_path)
    assert again.number({"damage": "a"}, never) == 0.25 and again.hits == 1
    assert again.number({"damage": "b"}, lambda: 1.0) == 1.0
    assert journal(tmp_path, data="other").number({"damage": "a"}, lambda: 2.0) == 2.0


def test_other_sources_are_another_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal(tmp_path).number({"damage": "a"}, lambda: 0.25)
    monkeypatch.setattr(module, "source_digest", lambda *_: "changed")
    assert journal(tmp_path).number({"damage": "a"}, lambda: 0.5) == 0.5


def test_errors_are_asked_for_sites_not_known_only(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def price(wanted):  # type: ignore[no-untyped-def]
        asked.append(list(wanted))
        return {site: {one: float("inf") if one else 0.0 for one in of} for site, of in wanted.items()}

    two = {"a": [(), NARROW], "b": [()]}
    found = journal(tmp_path).errors({"a": two["a"]}, {"tokens": 5}, price)
    assert found == {"a": {(): 0.0, NARROW: float("inf")}}
    assert journal(tmp_path).errors(two, {"tokens": 5}, price) == {**found, "b": {(): 0.0}}
    journal(tmp_path).errors({"a": [(), WIDE]}, {"tokens": 5}, price)
    journal(tmp_path).errors({"a": two["a"]}, {"tokens": 6}, price)
    assert asked == [["a"], ["b"], ["a"], ["a"]]


class TestVariants:
    def solved(self) -> tuple[Plan, dict[str, Site]]:
        graph, found = model("bert")
        plan = uniform(found, keep=3, width=24)
        return plan, assemble(graph, found.sites, plan, discover(), feeds(graph, 0, 6)).sites

    def test_weights_come_back(self, tmp_path: Path) -> None:
        plan, sites = self.solved()
        before = model("bert")[1].sites
        assert journal(tmp_path).variant(plan, {"tokens": 1}, before, lambda: sites) is sites
        back = journal(tmp_path).variant(plan, {"tokens": 1}, before, never)
        assert set(back) == set(sites)
        for name, site in sites.items():
            assert all(np.array_equal(a, b) for a, b in zip(_arrays(site), _arrays(back[name]), strict=True)), name

    def test_a_damaged_one_is_solved_again(self, tmp_path: Path) -> None:
        plan, sites = self.solved()
        before = model("bert")[1].sites
        journal(tmp_path).variant(plan, {}, before, lambda: sites)
        for file in (tmp_path / "variants").glob("*/plan.safetensors"):
            file.write_bytes(file.read_bytes()[:100])
        assert journal(tmp_path).variant(plan, {}, before, lambda: sites) is sites

    def test_the_oldest_go_and_no_room_is_no_reason_to_stop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan, sites = self.solved()
        before = model("bert")[1].sites
        monkeypatch.setattr(module, "KEPT_VARIANTS", 2)
        for tokens in range(4):
            journal(tmp_path).variant(plan, {"tokens": tokens}, before, lambda: sites)
        assert len(list((tmp_path / "variants").iterdir())) == 2
        shutil.rmtree(tmp_path / "variants")
        (tmp_path / "variants").write_text("in the way")
        assert journal(tmp_path).variant(plan, {}, before, lambda: sites) is sites


def test_scores_come_back_sample_by_sample(tmp_path: Path) -> None:
    paired = Paired("cosine", "cosine", np.array([1.0, 1.0]), np.array([0.5, 0.75]), ideal_original=True)
    journal(tmp_path).paired(Plan(), {}, lambda: paired)
    back = journal(tmp_path).paired(Plan(), {}, never)  # type: ignore[arg-type]
    assert back.metric == "cosine" and back.ideal_original and back.losses.tolist() == [0.5, 0.25]


def _arrays(site: Site) -> list[np.ndarray]:
    from tests.passes.contract import leaves

    return [leaf for _, leaf in leaves(site, "") if isinstance(leaf, np.ndarray)]
